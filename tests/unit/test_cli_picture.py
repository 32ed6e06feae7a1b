"""The picture of a swarm, as text."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from shoal.cli.picture import render, render_route
from shoal.net.transport import ModelInfo
from shoal.routing.route import Measured, Needs, Route, choose_route
from shoal.routing.view import SwarmView
from shoal.spans import ServerInfo, ServerState, Span

MODEL = ModelInfo(key="llama-8x64-1a2b3c4d", name="org/tiny", family="llama", num_blocks=8)


def server(name: str, span: str, state: ServerState = ServerState.ONLINE) -> ServerInfo:
    return ServerInfo(
        peer=f"12D3KooW{name * 20}",
        span=Span.parse(span),
        state=state,
        fingerprint="f" * 32,
        decode_speed=1234.5,
        prefill_speed=98765.4,
        cache_tokens_left=1 << 20,
        dtype="bfloat16",
        quantization="none",
        version="0.1.0",
        name=name,
    )


def picture(*servers: ServerInfo, model: ModelInfo = MODEL, width: int = 80) -> str:
    out = Console(file=io.StringIO(), width=width)
    for part in render(model, SwarmView(model.num_blocks, servers), width=width):
        out.print(part)
    return out.file.getvalue()


def test_a_hole_is_named():
    text = picture(server("a", "0:4"), server("b", "2:4"))
    assert "missing: blocks 4:8" in text
    assert "1122····" in text
    assert "████····" in text


def test_a_hole_that_is_being_filled_is_still_a_hole():
    assert "missing: blocks 4:8 (4:6 are being loaded)" in picture(
        server("a", "0:4"), server("b", "4:6", ServerState.JOINING)
    )


def test_who_left_counts_no_longer():
    text = picture(server("a", "0:8"), server("b", "0:8", ServerState.LEAVING))
    assert "11111111" in text
    assert "complete" in text


def test_a_model_that_nobody_serves_is_said_to_be_so():
    assert "nobody serves it" in picture()


def test_what_all_servers_share_is_said_once_and_the_rest_in_columns():
    same = picture(server("a", "0:4"), server("b", "4:8"))
    assert same.count("bfloat16") == 1
    differing = picture(server("a", "0:4"), replace(server("b", "4:8"), dtype="float32", quantization="nf4"))
    assert "float32, nf4" in differing
    assert differing.count("bfloat16") == 2  # in the column, and in the line that says who differs


def test_servers_that_compute_in_different_dtypes_are_named_in_one_line():
    line = "servers of equal weights compute differently: bfloat16: a; float32: b"
    assert line in picture(server("a", "0:4"), replace(server("b", "4:8"), dtype="float32")).splitlines()
    assert "differently" not in picture(server("a", "0:4"), server("b", "4:8"))
    other_weights = replace(server("b", "4:8"), dtype="float32", fingerprint="0" * 32)
    assert "differently" not in picture(server("a", "0:4"), other_weights)


def test_queues_and_heads_are_shown_where_there_are_any():
    assert "queue" not in picture(server("a", "0:8"))
    text = picture(server("a", "0:4"), replace(server("b", "4:8"), queue_length=17, head=True))
    assert text.splitlines()[2].split()[-2:] == ["queue", "head"]
    assert text.splitlines()[4].split()[-2:] == ["17", "yes"]
    assert max(len(line) for line in text.splitlines()) <= 80


def way(route: Route | None) -> list[str]:
    out = Console(file=io.StringIO(), width=80)
    for part in render_route(route):
        out.print(part)
    return out.file.getvalue().splitlines()


def test_a_way_is_shown_hop_by_hop_with_what_each_costs():
    view = SwarmView(8, (replace(server("a", "0:4"), decode_speed=100.0), server("b", "4:8")))
    known = Measured({each.peer: 0.02 for each in view.servers})
    lines = way(choose_route(view, Span(0, 8), needs=Needs(), known=known))
    assert lines[0].startswith("from here, a token would take 54.8 ms, or 18.2 tokens/s")
    assert [line.split() for line in lines[2:]] == [
        ["a", "aaaaaa", "0:4", "12.0", "10.0"],
        ["b", "bbbbbb", "4:8", "22.0", "0.8"],
        ["and", "back", "10.0"],
    ]
    assert max(len(line) for line in lines) <= 80


def test_a_way_that_is_not_there_is_said_not_to_be():
    assert way(None)[0].startswith("there is no way from here")


@pytest.mark.parametrize("num_blocks", [1, 8, 80, 126])
def test_it_fits_into_eighty_columns(num_blocks):
    model = replace(MODEL, num_blocks=num_blocks)
    text = picture(server("a" * 40, f"0:{num_blocks}"), server("b", f"{num_blocks - 1}:{num_blocks}"), model=model)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "online" in text
    assert f"0:{num_blocks}" in text
    assert "complete" in text
