"""Half of a swarm is upgraded: processes with two versions of the protocol, side by side."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from shoal.bundled import STORIES
from shoal.host.processes import Child, Children
from shoal.protocol import PROTOCOL_VERSION
from shoal.testing.preloaded import PreloadedProcess

from .conftest import Done, Shoal

SECONDS = 120.0
"""The limit for a wait. A test that reaches it fails."""
NEXT = PROTOCOL_VERSION + 1
UPGRADED = f"""
from shoal import protocol
from shoal.protocol import versions
for place in versions, protocol:
    place.PROTOCOL_VERSION = {NEXT}
    place.PROTOCOL = versions.protocol_id({NEXT})
from shoal.__main__ import main
main()
"""
"""The program `shoal` of the next version: its modules take the version from where this sets it."""


def errors(done: Done) -> tuple[str, str]:
    """The error and the hint that a command has printed."""
    lines = dict(line.split(": ", 1) for line in done.err.splitlines() if line.startswith(("error: ", "hint: ")))
    return lines["error"], lines["hint"]


@pytest.fixture(scope="module")
def bootstrap() -> Iterator[Child]:
    """A bootstrap peer of this version. It takes no streams, and serves both."""
    with Children() as children:
        peer = children.start("bootstrap", "dht", "--host", "127.0.0.1", launch=PreloadedProcess)
        for _ in children.wait_for([peer], seconds=SECONDS):
            pass
        yield peer


@pytest.fixture(scope="module")
def upgraded(bootstrap: Child) -> Iterator[dict[str, str]]:
    """What a server of the next version prints. It serves all blocks, in the swarm of the bootstrap peer."""
    options = ("--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32", "--name", "new", "--exit-with-stdin")
    arguments = ("serve", str(STORIES), *options, "--initial-peers", bootstrap.facts["address"])
    with subprocess.Popen(
        [sys.executable, "-c", UPGRADED, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        facts: dict[str, str] = {}
        for line in server.stdout:
            fact, _, value = line.strip().partition(" ")
            facts.setdefault(fact, value.strip())
            if {"address", "code"} <= facts.keys():
                break
        yield facts
        server.terminate()


def test_a_client_is_told_which_server_speaks_which_protocol(
    shoal: Shoal, bootstrap: Child, upgraded: dict[str, str]
) -> None:
    done = shoal("generate", str(STORIES), "Once", "--initial-peers", bootstrap.facts["address"])
    error, hint = errors(done)
    assert done.code == 1
    assert "blocks 0:12 have no server that this client can talk to: new (shoal " in error
    assert f"speaks protocol {NEXT} of shoal, and this machine speaks {PROTOCOL_VERSION}" in error
    assert "upgrade shoal where it is older" in hint


@pytest.mark.parametrize("command", [("join",), ("generate",)])
def test_a_machine_with_a_code_is_told_when_it_arrives(
    shoal: Shoal, command: tuple[str], upgraded: dict[str, str]
) -> None:
    prompt = ("Once",) if command == ("generate",) else ("--host", "127.0.0.1")
    error, hint = errors(shoal(*command, upgraded["code"], *prompt))
    assert f"{upgraded['peer']} speaks protocol {NEXT} of shoal, and this machine speaks {PROTOCOL_VERSION}" in error
    assert "upgrade shoal where it is older" in hint


def test_status_shows_servers_of_both_versions_and_says_which_cannot_be_used(
    shoal: Shoal, bootstrap: Child, upgraded: dict[str, str]
) -> None:
    peers = ("--initial-peers", bootstrap.facts["address"])
    done = shoal("status", *peers)
    assert done.code == 1
    told = f"new speaks protocol {NEXT} of shoal, and this machine speaks {PROTOCOL_VERSION}: upgrade shoal"
    assert told in " ".join(done.out.split())
    (model,) = shoal("status", "--json", *peers).json["models"]
    assert (model["complete"], model["servers"][0]["protocol"]) == (False, NEXT)


def test_a_client_of_the_next_version_uses_the_servers_of_that_version(
    bootstrap: Child, upgraded: dict[str, str]
) -> None:
    options = ("--max-new-tokens", "4", "--initial-peers", bootstrap.facts["address"])
    command = (sys.executable, "-c", UPGRADED, "generate", str(STORIES), "Once upon a time", *options)
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stdout.startswith(", there was")) == (0, True), done.stderr


# The last test: it adds a server of this version.


def test_a_server_of_this_version_takes_the_blocks_that_only_the_other_version_has(
    shoal: Shoal, bootstrap: Child, upgraded: dict[str, str]
) -> None:
    peers = ("--initial-peers", bootstrap.facts["address"])
    options = ("--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32", "--name", "old")
    with Children() as children:
        server = children.start("old", "serve", str(STORIES), *options, *peers, launch=PreloadedProcess)
        for _ in children.wait_for([server], seconds=SECONDS):
            pass
        assert (server.facts["blocks"], server.facts["because"]) == ("0:12", "blocks 0:12 had no server")
        done = shoal("generate", str(STORIES), "Once upon a time", "--max-new-tokens", "4", *peers)
    assert (done.code, done.out.startswith(", there was")) == (0, True), done.err
    assert "through old 0:12" in done.err
