"""The exit status and the JSON of `shoal status`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from shoal.cli import run, status
from shoal.cli.status import ModelStatus
from shoal.peers import ModelInfo, ServerInfo, ServerState
from shoal.policy.view import SwarmView
from shoal.spans import Span

MODEL = ModelInfo(key="llama-8x64-1a2b3c4d", name="org/tiny", family="llama", num_blocks=8)
SERVER = ServerInfo(
    peer="12D3KooWalice",
    span=Span(0, 8),
    state=ServerState.ONLINE,
    fingerprint="f" * 32,
    decode_speed=10.0,
    prefill_speed=100.0,
    cache_tokens_left=1024,
    dtype="float32",
    quantization="none",
    version="0.1.0",
)
WHOLE = ModelStatus(MODEL, SwarmView(8, (SERVER,)))
HALF = ModelStatus(MODEL, SwarmView(8, (replace(SERVER, span=Span(0, 4)),)))
LOADING = ModelStatus(MODEL, SwarmView(8, (replace(SERVER, state=ServerState.JOINING, decode_speed=None),)))
UNSERVED = ModelStatus(MODEL, SwarmView(8))


@pytest.fixture(autouse=True)
def same_log() -> Iterator[None]:
    """Restore the logging that a command sets up, for the tests that follow."""
    logger = logging.getLogger("shoal")
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


@pytest.mark.parametrize("options", [(), ("--json",), ("--route",)])
@pytest.mark.parametrize(
    ("found", "code"),
    [([WHOLE], 0), ([], 0), ([HALF], 1), ([LOADING], 1), ([UNSERVED], 1), ([WHOLE, HALF], 1), ([WHOLE, WHOLE], 0)],
)
def test_the_exit_status_is_1_while_blocks_of_a_model_are_missing(monkeypatch, capsys, options, found, code):
    async def look(*_: Any, **__: Any) -> list[ModelStatus]:
        return list(found)

    monkeypatch.setattr(status, "look", look)
    assert (
        run(
            [
                "status",
                "--initial-peers",
                "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWJ7AGY8UgbLy5iwRC5SvH8mb76vALZEcmFGykw4fRod8K",
                *options,
            ]
        )
        == code
    )
    out, err = capsys.readouterr()
    assert not err
    if "--json" in options:
        assert [model["complete"] for model in json.loads(out)["models"]] == [each is WHOLE for each in found]


def test_a_speed_that_was_not_measured_is_null_in_json():
    (server,) = LOADING.as_json()["servers"]
    assert server["decode_speed"] is None


def test_help_explains_the_exit_status(capsys):
    assert run(["status", "--help"]) == 0
    assert "exit status is 1" in " ".join(capsys.readouterr().out.split()).lower()


def test_json_says_why_a_server_took_its_blocks_and_when_it_will_be_ready():
    loading = replace(SERVER, state=ServerState.JOINING, reason="blocks 0:8 had no server", ready_at=1e9, up_since=9e8)
    (server,) = ModelStatus(MODEL, SwarmView(8, (loading,))).as_json()["servers"]
    assert (server["reason"], server["ready_at"], server["up_since"]) == ("blocks 0:8 had no server", 1e9, 9e8)
