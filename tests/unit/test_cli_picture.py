"""The picture of a swarm, as text."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from shoal.cli.picture import render
from shoal.net.transport import ModelInfo
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
    assert differing.count("bfloat16") == 1


@pytest.mark.parametrize("num_blocks", [1, 8, 80, 126])
def test_it_fits_into_eighty_columns(num_blocks):
    model = replace(MODEL, num_blocks=num_blocks)
    text = picture(server("a" * 40, f"0:{num_blocks}"), server("b", f"{num_blocks - 1}:{num_blocks}"), model=model)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "online" in text
    assert f"0:{num_blocks}" in text
    assert "complete" in text
