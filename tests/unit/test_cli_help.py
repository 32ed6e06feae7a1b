"""What the command line says before it does anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from typing import Any

import pytest

from shoal.__main__ import main
from shoal.cli.console import WrongUsage
from shoal.cli.options import peers_of, pins, sampling, server_name, spread_peers, swarm_peers

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


def shoal(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own: it changes how this one logs."""
    return subprocess.run(
        [sys.executable, "-m", "shoal", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_shoal_alone_prints_its_help_as_it_is_and_is_wrong_usage():
    alone, asked = shoal(), shoal("--help")
    assert (alone.returncode, asked.returncode) == (2, 0)
    assert (alone.stdout, alone.stderr) == ("", asked.stdout)
    assert "\nCommands:\n  demo " in alone.stderr


@pytest.mark.parametrize(
    ("words", "found"), [("shoal st", {"status"}), ("shoal serve m --dtype f", {"float32", "float16"})]
)
def test_a_shell_completes_commands_and_options_without_importing_anything_slow(words, found):
    program = (
        "import atexit, sys\nfrom shoal.cli import main\n"
        f"atexit.register(lambda: print([name for name in {SLOW} if name in sys.modules]))\nmain([])"
    )
    asked = {"_SHOAL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | asked, capture_output=True, text=True, timeout=60, check=True
    )
    *completions, slow = done.stdout.splitlines()
    assert set(completions) == found
    assert slow == "[]"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_of_a_shell_can_be_shown(shell):
    done = shoal("--show-completion", shell)
    assert done.returncode == 0
    assert "_SHOAL_COMPLETE" in done.stdout


def test_what_is_wrong_at_first_sight_is_refused_before_anything_slow_is_imported(tmp_path):
    peer = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWJ7AGY8UgbLy5iwRC5SvH8mb76vALZEcmFGykw4fRod8K"
    (tmp_path / "no-model").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    refused = {
        "not the address of a peer": [
            *(["serve", "m"], ["generate", "m", "hi"], ["chat", "m"], ["status"], ["dht"]),
        ],
        "there is no folder ./nowhere": [
            *(["serve", "./nowhere"], ["generate", "./nowhere", "hi"], ["chat", "./nowhere"], ["status", "./nowhere"]),
            *(["serve", "model", "--adapter", "./nowhere"], ["generate", "model", "hi", "--adapter", "./nowhere"]),
        ],
        "no-model has no config.json": [["serve", "no-model"], ["generate", "no-model", "hi"], ["chat", "no-model"]],
        "not an IP address to listen on": [["serve", "model", "--host", "localhost"], ["dht", "--host", "localhost"]],
        "not an address to announce": [["serve", "model", "--announce", "here"], ["dht", "--announce", "here"]],
        "not the address of a peer: 'a-relay'": [["serve", "model", "--relay", "a-relay"]],
    }
    program = (
        "import json, sys\nfrom shoal.cli import run\n"
        "for command in json.loads(sys.argv[1]):\n    print(run(command))\n"
        f"print([name for name in {SLOW} if name in sys.modules])"
    )
    commands = [
        (error, [*command, "--initial-peers", "127.0.0.1:31337" if error == "not the address of a peer" else peer])
        for error, of_error in refused.items()
        for command in of_error
    ]
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps([command for _, command in commands])],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["1"] * len(commands) + ["[]"]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for (expected, command), error in zip(commands, errors, strict=True):
        assert expected in error, command


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


def test_a_server_is_called_like_its_host_unless_it_is_told_otherwise():
    assert server_name(None, "alpha.example.org") == "alpha"
    assert server_name("beta", "alpha") == "beta"
    assert server_name("", "alpha") == ""
    assert server_name(None, "") == ""
    assert server_name(None, "a\x1b[31m" + "b" * 100) == "a[31m" + "b" * 27


def test_a_name_that_no_peer_would_accept_is_refused():
    assert len(server_name("n" * 128, "alpha")) == 128
    with pytest.raises(WrongUsage, match="a name of 129 characters"):
        server_name("n" * 129, "alpha")
    with pytest.raises(WrongUsage, match="control characters"):
        server_name("a\x1b[31m", "alpha")


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
