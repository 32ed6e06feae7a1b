"""Help, completion, and the errors that need no slow import."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import types
from typing import Any

import pytest

from shoal.__main__ import main
from shoal.cli import run, serve, share_cores
from shoal.cli.network_options import spread_peers
from shoal.cli.options import peers_of, pins, sampling, server_name, swarm_peers
from shoal.cli.terminal.console import WrongUsage

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


def test_the_options_of_a_large_command_stand_in_groups_and_none_is_lost():
    text = shoal("serve", "--help").stdout
    titles = [line for line in text.splitlines() if line and not line.startswith((" ", "Usage"))]
    assert titles == ["Arguments:", "Swarm:", "Model:", "Computation:", "Cache and training:", "Network:", "Options:"]
    assert max(len(line) for line in text.splitlines()) <= 80
    parameters = inspect.signature(serve.command).parameters
    listed = re.findall(r"^  (?:-\w, )?--([a-z-]+)", text, flags=re.MULTILINE)
    assert sorted(listed) == sorted(
        {each.replace("_", "-") for each in parameters} - {"model", "mark", "exit-with-stdin"} | {"config", "help"}
    )


def shoal(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in its own process, because it changes the logging of its process."""
    return subprocess.run(
        [sys.executable, "-m", "shoal", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_shoal_without_a_command_prints_its_help_and_is_wrong_usage():
    alone, asked = shoal(), shoal("--help")
    assert (alone.returncode, asked.returncode) == (2, 0)
    assert (alone.stdout, alone.stderr) == ("", asked.stdout)
    assert "\nCommands:\n  demo " in alone.stderr


@pytest.mark.parametrize(
    ("words", "found"), [("shoal st", {"status"}), ("shoal serve m --dtype f", {"float32", "float16"})]
)
def test_shell_completion_imports_nothing_slow(words, found):
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
def test_the_completion_script_of_a_shell_can_be_shown(shell):
    done = shoal("--show-completion", shell)
    assert done.returncode == 0
    assert "_SHOAL_COMPLETE" in done.stdout


def test_obvious_mistakes_are_refused_before_anything_slow_is_imported(tmp_path):
    peer = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWJ7AGY8UgbLy5iwRC5SvH8mb76vALZEcmFGykw4fRod8K"
    code = "8H00-FNPG-1R75-Y20Q-E000-1054-Y3PK"
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
        f"{code} is an invite code": [["status", "--initial-peers", code], ["chat", "m", "--initial-peers", code]],
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
    assert done.stdout.splitlines() == ["2"] * len(commands) + ["[]"]
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
def test_other_arguments_are_not_taken_for_peers(arguments):
    assert spread_peers(arguments) == arguments


def test_peers_come_from_the_option_or_else_from_the_environment(monkeypatch):
    monkeypatch.setenv("SHOAL_INITIAL_PEERS", f"{A} {B}")
    assert peers_of(None) == (A, B)
    assert peers_of([B]) == (B,)
    assert peers_of([f"{A},{B}"]) == (A, B)
    monkeypatch.delenv("SHOAL_INITIAL_PEERS")
    assert peers_of(None) == ()
    with pytest.raises(WrongUsage, match="which swarm"):
        swarm_peers(None)


def test_the_default_name_of_a_server_is_that_of_its_host():
    assert server_name(None, "alpha.example.org") == "alpha"
    assert server_name("beta", "alpha") == "beta"
    assert server_name("", "alpha") == ""
    assert server_name(None, "") == ""
    assert server_name(None, "a\x1b[31m" + "b" * 100) == "a[31m" + "b" * 27


def test_a_server_name_that_peers_would_refuse_is_an_error():
    assert len(server_name("n" * 128, "alpha")) == 128
    with pytest.raises(WrongUsage, match="a name of 129 characters"):
        server_name("n" * 129, "alpha")
    with pytest.raises(WrongUsage, match="control characters"):
        server_name("a\x1b[31m", "alpha")


def test_decoding_is_greedy_unless_an_option_asks_for_sampling():
    assert sampling(None, None, None, None) == {"do_sample": False, "num_beams": 1}
    assert sampling(0.0, None, None, None)["do_sample"] is False
    assert sampling(0.5, 0.9, None, 1) == {
        "do_sample": True, "num_beams": 1, "temperature": 0.5, "top_p": 0.9, "top_k": 0,
    }  # fmt: skip
    assert sampling(None, None, 5, None)["temperature"] == 1.0


def test_a_seed_without_sampling_is_an_error():
    with pytest.raises(WrongUsage, match="--seed"):
        sampling(None, None, None, 7)
    with pytest.raises(WrongUsage, match="temperature of 0"):
        sampling(0.0, 0.5, None, None)


def test_the_option_pin_may_be_repeated():
    assert pins(None) == {}
    assert pins(["0:4=A", "4:8=B", "0:4=A"]) == {"0:4": "A", "4:8": "B"}
    for wrong in "0:4", "0:4=", "=A":
        with pytest.raises(WrongUsage, match="not a span and a peer"):
            pins([wrong])
    with pytest.raises(WrongUsage, match="pinned to two peers"):
        pins(["0:4=A", "0:4=B"])


def test_ctrl_c_during_the_imports_prints_no_traceback(monkeypatch, capsys):
    class Importing(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "shoal.cli", Importing("shoal.cli"))
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130
    assert capsys.readouterr() == ("", "")


def test_the_program_leaves_out_the_interpreters_end_once_pytorch_was_imported(monkeypatch: pytest.MonkeyPatch):
    ended: list[int] = []
    monkeypatch.setattr("shoal.cli.end_now", ended.append)
    monkeypatch.setattr(sys, "argv", ["shoal", "--no-such-option"])
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    with pytest.raises(SystemExit):
        main()
    assert ended == [2]


@pytest.mark.parametrize(("chosen", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_sleep_unless_the_user_has_chosen(
    chosen: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "environ", {} if chosen is None else {"OMP_WAIT_POLICY": chosen})
    share_cores()
    assert os.environ == {"OMP_WAIT_POLICY": expected}


@pytest.mark.parametrize("command", ["join", "doctor"])
def test_an_argument_that_may_be_left_out_stands_in_one_pair_of_brackets(
    command: str, capsys: pytest.CaptureFixture[str]
):
    assert run([command, "--help"]) == 0
    usage = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Usage: "))
    assert usage.split() == ["Usage:", "shoal", command, "[OPTIONS]", "[CODE]"]
