"""What the command line says before it does anything."""

from __future__ import annotations

import subprocess
import sys
import types
from typing import Any

import pytest

from shoal.__main__ import main
from shoal.cli.console import WrongUsage
from shoal.cli.options import peers_of, pins, sampling, spread_peers, swarm_peers

A, B = "/ip4/127.0.0.1/tcp/1/p2p/A", "/ip4/127.0.0.1/tcp/2/p2p/B"
SLOW = ("torch", "transformers", "hivemind", "huggingface_hub")


def test_help_is_quick_because_it_imports_nothing_slow():
    program = (
        "import sys\nfrom shoal.cli import run\nassert run(['--help']) == 0\nassert run(['serve', '--help']) == 0\n"
        f"print([name for name in {SLOW} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(command in done.stdout for command in ("demo", "serve", "dht", "generate", "chat", "status"))


def test_several_peers_may_follow_one_option():
    assert spread_peers(["generate", "m", "hi", "--initial-peers", A, B, "--json"]) == [
        *("generate", "m", "hi", "--initial-peers", A, "--initial-peers", B, "--json")
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--initial-peers", A, "/models/llama"],
        ["serve", "--initial-peers", A, "--initial-peers", B, "m"],
        ["generate", "--initial-peers=" + A, "m", "/ip4 is what?"],
        ["status", A],
        [],
    ],
)
def test_nothing_else_is_taken_for_a_peer(arguments):
    assert spread_peers(arguments) == arguments


def test_peers_come_from_the_options_or_else_from_the_environment(monkeypatch):
    monkeypatch.setenv("SHOAL_INITIAL_PEERS", f"{A} {B}")
    assert peers_of(None) == (A, B)
    assert peers_of([B]) == (B,)
    assert peers_of([f"{A},{B}"]) == (A, B)
    monkeypatch.delenv("SHOAL_INITIAL_PEERS")
    assert peers_of(None) == ()
    with pytest.raises(WrongUsage, match="which swarm"):
        swarm_peers(None)


def test_text_is_greedy_unless_chance_is_asked_for():
    assert sampling(None, None, None, None) == {"do_sample": False, "num_beams": 1}
    assert sampling(0.0, None, None, None)["do_sample"] is False
    assert sampling(0.5, 0.9, None, 1) == {
        "do_sample": True, "num_beams": 1, "temperature": 0.5, "top_p": 0.9, "top_k": 0,
    }  # fmt: skip
    assert sampling(None, None, 5, None)["temperature"] == 1.0


def test_a_seed_without_chance_is_a_mistake():
    with pytest.raises(WrongUsage, match="--seed"):
        sampling(None, None, None, 7)
    with pytest.raises(WrongUsage, match="temperature of 0"):
        sampling(0.0, 0.5, None, None)


def test_blocks_are_pinned_to_peers_by_an_option_that_is_repeated():
    assert pins(None) == {}
    assert pins(["0:4=A", "4:8=B", "0:4=A"]) == {"0:4": "A", "4:8": "B"}
    for wrong in "0:4", "0:4=", "=A":
        with pytest.raises(WrongUsage, match="not a span and a peer"):
            pins([wrong])
    with pytest.raises(WrongUsage, match="pinned to two peers"):
        pins(["0:4=A", "0:4=B"])


def test_ctrl_c_while_the_program_is_being_imported_prints_no_traceback(monkeypatch, capsys):
    class Importing(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "shoal.cli", Importing("shoal.cli"))
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130
    assert capsys.readouterr() == ("", "")
