"""The picture of a swarm, as text."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from shoal.cli.render import render, render_route
from shoal.peers import ModelInfo, ServerInfo, ServerState
from shoal.policy.routing.route import Measured, Needs, Route, choose_route
from shoal.policy.view import SwarmView
from shoal.spans import Span

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


def busy(name: str, span: str, **changes: Any) -> ServerInfo:
    """A server with something in every column."""
    other = {"dtype": "float32", "quantization": "nf4", "version": "0.2.0", "fingerprint": "e" * 32}
    more = {"queue_length": 12345, "head": True, "training": False, "adapters": ("one", "two")}
    return replace(server(name, span), **other | more | changes)


NARROW, USUAL, WIDE = 60, 80, 160


@pytest.mark.parametrize("width", [NARROW, USUAL, 100, 140, WIDE])
def test_server_peer_blocks_and_state_are_whole_at_every_width(width):
    model = replace(MODEL, num_blocks=126)
    name = "a-long-name-1234"
    text = picture(server(name, "0:126"), busy("b", "120:126", state=ServerState.JOINING), model=model, width=width)
    lines = text.splitlines()
    assert max(map(cell_len, lines)) <= width
    header, first, second = (
        next(line.split() for line in lines if word in line) for word in ("peer", "0:126", "120:126")
    )
    assert header[:3] == ["server", "peer", "blocks"]
    assert first[1:3] == ["e-1234", "0:126"]
    assert second[:3] == ["b", "bbbbbb", "120:126"]
    assert "online" in first
    assert "joining" in second


def test_what_has_no_room_is_left_out_whole_and_named():
    servers = server("a-long-name-1234", "0:4"), busy("b", "4:8")
    wide = picture(*servers, width=WIDE)
    assert "not shown" not in wide
    assert all(title in wide for title in ("tokens/s", "prefill", "cache", "queue", "head", "training", "adapters"))
    assert all(title in wide for title in ("dtype", "weights", "version"))
    narrow = picture(*servers, width=NARROW)
    header = next(line for line in narrow.splitlines() if line.startswith("server "))
    note = narrow.partition("not shown")[2]
    assert all((title in header) != (title in note) for title in ("tokens/s", "prefill", "cache", "queue", "version"))
    assert "dtype" in header  # a mixture matters more than room
    assert "--json" in narrow


def test_a_speed_that_was_not_measured_is_not_shown():
    joining = replace(
        server("b", "4:8", ServerState.JOINING), decode_speed=None, prefill_speed=None, cache_tokens_left=0
    )
    line = next(line for line in picture(server("a", "0:4"), joining).splitlines() if "joining" in line)
    assert line.split() == ["b", "bbbbbb", "4:8", "····████", "joining", "…", "…", "…"]


def test_a_speed_below_one_is_shown_with_its_digits():
    slow = replace(server("a", "0:8"), decode_speed=0.333, prefill_speed=4.56)
    line = next(line for line in picture(slow).splitlines() if "online" in line)
    assert line.split()[-3:] == ["0.333", "4.56", "1.0M"]


def test_a_name_with_markup_in_it_is_shown_as_it_is():
    text = picture(server("[/red]", "0:4"), server("[bold]b", "4:8"))
    assert "[/red]" in text
    assert "[bold]b" in text
    view = SwarmView(8, (server("[/red]", "0:8"),))
    assert way(choose_route(view, Span(0, 8), needs=Needs(), known=Measured({})))[2].startswith("[/red]")


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
