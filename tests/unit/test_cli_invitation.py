"""The commands that a server prints for others to join its swarm and to use its model."""

from __future__ import annotations

import shlex

import pytest

from shoal.cli.invitation import invitation
from shoal.server.config import ServerConfig

ADDRESS = "/ip4/127.0.0.1/tcp/1/p2p/A"


def commands(config: ServerConfig) -> tuple[list[str], list[str]]:
    """What follows `shoal`, for joining and for using."""
    join, use = (line.strip() for line in invitation(config, ADDRESS) if line.startswith("  shoal "))
    return shlex.split(join)[1:], shlex.split(use)[1:]


def test_without_options_they_are_short():
    join, use = commands(ServerConfig(model="org/model"))
    assert join == ["serve", "org/model", "--initial-peers", ADDRESS]
    assert use == ["generate", "org/model", "Once upon a time", "--initial-peers", ADDRESS]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dtype": "float32"}, ["--dtype", "float32"]),
        ({"revision": "a branch"}, ["--revision", "a branch"]),
        ({"allow_uncertified": True}, ["--allow-uncertified"]),
    ],
)
def test_what_changes_the_model_or_its_numbers_is_in_both(options, expected):
    join, use = commands(ServerConfig(model="a folder", **options))
    assert join == ["serve", "a folder", *expected, "--initial-peers", ADDRESS]
    assert use == ["generate", "a folder", *expected, "Once upon a time", "--initial-peers", ADDRESS]


def test_how_weights_and_sessions_are_held_concerns_servers_alone():
    join, use = commands(ServerConfig(model="m", dtype="float16", quantization="nf4", cache_dtype="int8"))
    assert join[2:8] == ["--dtype", "float16", "--quantization", "nf4", "--cache-dtype", "int8"]
    assert use[2:4] == ["--dtype", "float16"]
    assert "nf4" not in use
    assert "int8" not in use


def test_what_one_machine_alone_decides_is_in_neither():
    config = ServerConfig(model="m", device="cuda", num_threads=3, cache_tokens=99, name="me", num_blocks=2)
    assert commands(config) == commands(ServerConfig(model="m"))
