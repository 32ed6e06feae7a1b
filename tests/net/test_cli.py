"""The commands as users run them: each server is a process, and the network is libp2p on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from shoal.bundled import STORIES
from shoal.host.processes import Child, Children
from shoal.joining.invite_code import InviteCode
from shoal.net.addressing.addresses import port_of
from shoal.testing.preloaded import PreloadedProcess

PROMPT = "Once upon a time"
SECONDS = 120.0
"""The limit for a wait. A test that reaches it fails."""


def without_progress(err: str) -> list[str]:
    """The lines of stderr that are not about progress."""
    return [line for line in err.splitlines() if " INFO shoal.progress: " not in line]


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Children]:
    """Processes that end after the last test. Their cache is empty at first: they measure their speed."""
    with pytest.MonkeyPatch.context() as patch, Children() as children:
        patch.setenv("SHOAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield children


def serve(children: Children, name: str, *arguments: str) -> Child:
    options = ("--name", name, "--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32", "--cache-tokens", "4096")
    return children.start(name, "serve", str(STORIES), *options, *arguments, launch=PreloadedProcess)


def ready(children: Children, *wanted: Child) -> None:
    for _ in children.wait_for(wanted, seconds=SECONDS):
        pass


@pytest.fixture(scope="module")
def first(children: Children) -> Child:
    """A server of the first half of the model, which starts the swarm."""
    server = serve(children, "first", "--new-swarm", "--blocks", "0:6")
    ready(children, server)
    return server


@pytest.fixture(scope="module")
def second(children: Children, first: Child) -> Child:
    """A server that joins by an invite code, without a copy of the model, and chooses the other half."""
    options = ("--name", "second", "--host", "127.0.0.1", "--device", "cpu", "--cache-tokens", "4096")
    joining = ("join", code_of(children, first), "--num-blocks", "6")
    server = children.start("second", *joining, *options, launch=PreloadedProcess)
    ready(children, server)
    return server


def code_of(children: Children, server: Child) -> str:
    """The invite code that a server prints."""
    while "code" not in server.facts:
        assert not server.has_ended
        children.wait_for_news(SECONDS)
    return server.facts["code"]


@pytest.fixture
def peers(first: Child, monkeypatch: pytest.MonkeyPatch) -> str:
    """The swarm's address, which is also in the environment of the commands."""
    address = first.facts["address"]
    monkeypatch.setenv("SHOAL_INITIAL_PEERS", address)
    return address


def test_a_server_prints_its_blocks_address_and_speed(first):
    assert first.facts["blocks"] == "0:6"
    assert first.facts["address"].endswith("/p2p/" + first.facts["peer"])
    assert "tokens/s" in first.facts["decoding"]


# These tests need this order: the swarm grows, then shrinks.


def test_status_names_the_missing_blocks(shoal, peers):
    done = shoal("status", "--initial-peers", peers)
    assert done.code == 1
    assert "missing: blocks 6:12" in done.out
    assert done.is_plain
    as_json = shoal("status", "--json")
    assert as_json.code == 1
    (model,) = as_json.json["models"]
    assert not model["complete"]
    assert model["missing"] == [6, 7, 8, 9, 10, 11]
    assert model["missing_spans"] == ["6:12"]
    assert "no route from this machine" in shoal("status", "--route").out


def test_generate_names_the_missing_blocks_in_two_lines(shoal, peers):
    done = shoal("generate", str(STORIES), PROMPT)
    assert done.code == 1
    assert done.out == ""
    assert done.err.startswith("error: no server holds blocks 6:12 of stories\nhint: ")
    assert done.err.count("\n") == 2


def test_generate_gives_the_tokens_of_the_whole_model(shoal, peers, second):
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    whole = AutoModelForCausalLM.from_pretrained(STORIES, dtype="float32")
    ids = whole.generate(**tokenizer(PROMPT, return_tensors="pt"), do_sample=False, max_new_tokens=16)[0]
    expected = tokenizer.decode(ids, skip_special_tokens=True).removeprefix(PROMPT)

    command = ("generate", str(STORIES), "--dtype", "float32", "--max-new-tokens", "16")
    answer = shoal(*command, PROMPT, "--json").json
    assert answer["text"] == expected
    assert answer["tokens"] == ids[-16:].tolist()
    assert [(server["name"], server["blocks"]) for server in answer["servers"]] == [
        ("first", "0:6"),
        ("second", "6:12"),
    ]

    in_the_swarms_dtype = ("generate", str(STORIES), "--max-new-tokens", "16")
    streamed = shoal(*in_the_swarms_dtype, "-", stdin=PROMPT)
    assert streamed.code == 0
    assert streamed.out == expected + "\n"
    assert "through first 0:6, second 6:12" in streamed.err
    assert streamed.is_plain


def test_generate_uses_an_adapter(shoal, peers, second, tmp_path: Path):
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_pretrained(STORIES, dtype="float32")
    tuned = get_peft_model(whole, LoraConfig(init_lora_weights=False, target_modules="all-linear"))
    tuned.save_pretrained(tmp_path)
    inputs = AutoTokenizer.from_pretrained(STORIES)(PROMPT, return_tensors="pt")
    expected = tuned.generate(**inputs, do_sample=False, max_new_tokens=16)[0, -16:].tolist()
    options = ("--dtype", "float32", "--max-new-tokens", "16", "--json", "--adapter")
    assert shoal("generate", str(STORIES), PROMPT, *options, str(tmp_path)).json["tokens"] == expected
    refused = shoal("generate", str(STORIES), PROMPT, *options, str(STORIES))
    assert refused.code == 1
    assert "has no adapter_config.json" in refused.err


def test_the_same_seed_samples_the_same_text(shoal, peers, second):
    command = ("generate", str(STORIES), PROMPT, "--max-new-tokens", "12", "--temperature", "1.5", "--seed")
    assert shoal(*command, "1").out == shoal(*command, "1").out != shoal(*command, "2").out


def test_chat_goes_on_in_one_session(shoal, peers, second):
    done = shoal("chat", str(STORIES), "--max-new-tokens", "8", stdin=f"{PROMPT}\n\nThe end.\n/new\n{PROMPT}\n")
    assert done.code == 0
    first_answer, second_answer, third_answer = done.out.splitlines()
    assert first_answer == third_answer != second_answer
    assert done.is_plain


def test_status_shows_all_servers(shoal, peers, second):
    done = shoal("status")
    assert done.code == 0
    assert "complete: every block is served" in done.out
    (model,) = shoal("status", str(STORIES), "--json").json["models"]
    assert model["complete"]
    servers = {server["name"]: server for server in model["servers"]}
    assert servers["second"]["span"] == [6, 12]
    assert servers["second"]["peer"] == second.facts["peer"]
    assert servers["second"]["state"] == "online"
    assert servers["second"]["decode_speed"] > 0


def test_a_fresh_code_is_enough_to_use_the_model(children, shoal, monkeypatch, first, second, tmp_path: Path):
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    invited = shoal("invite", "--initial-peers", second.facts["address"])
    assert shoal("invite", code_of(children, first)).out == invited.out
    assert invited.out.startswith(f"stories in float32, weights {first.facts['weights']}, 2 members:\n  shoal join ")
    fresh, printed = InviteCode.parse(invited.out.split()[-1]), InviteCode.parse(code_of(children, first))
    assert fresh.digest == printed.digest
    assert {way.port for way in fresh.ways} == {port_of(child.facts["address"]) for child in (first, second)}
    typed = str(fresh).lower().replace("-", " ")
    options = (PROMPT, "--max-new-tokens", "16", "--json")
    by_code, by_folder = (
        shoal("generate", *how, *options)
        for how in ([typed], [str(STORIES), "--initial-peers", first.facts["address"]])
    )
    assert by_code.code == 0, by_code.err
    assert by_code.json["tokens"] == by_folder.json["tokens"]
    (model,) = shoal("status", typed, "--json").json["models"]
    assert {server["name"] for server in model["servers"]} >= {"first", "second"}


def test_a_code_that_was_misheard_is_refused(shoal, children, first):
    code = code_of(children, first)
    other = code.replace(code[8], "7" if code[8] != "7" else "8", 1)
    for command in (["join", other], ["generate", other, PROMPT], ["chat", other], ["gateway", other]):
        done = shoal(*command)
        assert done.code == 2
        assert done.err.startswith("error: this invite code has a mistake in it")
        assert done.err.count("\n") == 2


def test_servers_say_how_others_reach_them(first, second):
    assert first.facts["reached"] == "no other peer has tried yet to reach this machine"
    assert second.facts["reached"] == "other machines reach this one directly (1 peer tried)"


def test_doctor_joins_by_a_code_and_takes_no_server_of_its_own_machine_for_another_one(shoal, children, peers, second):
    done = shoal("doctor", code_of(children, second), "--host", "127.0.0.1")
    assert done.code == 0, done.out + done.err
    said = " ".join(done.out.split())
    assert "no other peer has tried yet to reach this machine only servers of this machine were asked" in said
    assert "2 of 2 servers answer" in said
    assert "all of them are on this machine" in said
    assert "MB/s" not in said
    assert "the server first of this machine is online with blocks 0:6" in said
    assert done.is_plain


def test_doctor_says_what_to_do_for_a_machine_that_others_cannot_dial(shoal, peers):
    with socket.socket() as probe:  # a port of its own: one chosen at random says nothing of the servers here
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    given = ("--host", "127.0.0.1", "--port", port, "--announce", "/ip4/127.0.0.1/tcp/1")
    done = shoal("doctor", "--initial-peers", peers, *given, "--json")
    assert done.code == 1
    found = {each["subject"]: each for each in done.json["findings"]}
    assert not done.json["ok"]
    assert found["reached"]["health"] == "problem"
    assert "open TCP port" in found["reached"]["hint"]
    assert found["clock"]["health"] == "fine"


def test_doctor_without_a_swarm_looks_at_the_machine(shoal, monkeypatch):
    monkeypatch.delenv("SHOAL_INITIAL_PEERS", raising=False)
    done = shoal("doctor")
    assert "no swarm was named" in done.out


def test_status_shows_the_route_from_this_machine_and_its_cost(shoal, peers, second):
    done = shoal("status", str(STORIES), "--route")
    assert done.code == 0
    assert "from this machine, a token is expected to take" in done.out
    assert done.is_plain
    (model,) = shoal("status", "--route", "--json").json["models"]
    route = model["route"]
    assert [(hop["name"], hop["span"]) for hop in route["hops"]] == [("first", [0, 6]), ("second", [6, 12])]
    assert all(hop["network"] > 0 and hop["compute"] > 0 for hop in route["hops"])
    parts = ("network", "compute", "queue", "handicap")
    assert route["seconds"] == pytest.approx(route["back"] + sum(hop[part] for hop in route["hops"] for part in parts))


def test_pinning_blocks_to_a_peer_without_them_fails_in_two_lines(shoal, peers, first, second):
    pinned = f"0:6={second.facts['peer']}"
    done = shoal("generate", str(STORIES), PROMPT, "--pin", pinned)
    assert done.code == 1
    assert done.err.startswith(f"error: blocks 0:6 are pinned to {second.facts['peer']}, which holds 6:12\nhint: ")
    right = ("--pin", f"0:6={first.facts['peer']}", "--pin", pinned.replace("0:6", "6:12"), "--chooser", "nsga2")
    assert shoal("generate", str(STORIES), PROMPT, "--max-new-tokens", "4", *right).code == 0


def test_blocks_may_be_pinned_by_the_names_and_short_ids_that_status_shows(shoal, peers, first, second):
    shown = shoal("status").out
    short = second.facts["peer"][-6:]
    assert f"second  {short}" in shown
    right = ("--pin", "0:6=first", "--pin", f"6:12={short}")
    assert shoal("generate", str(STORIES), PROMPT, "--max-new-tokens", "4", *right).code == 0
    wrong = shoal("generate", str(STORIES), PROMPT, "--pin", "0:6=third")
    assert wrong.code == 1
    assert wrong.err.startswith("error: no server is called 'third', and no peer id begins or ends with that\nhint: ")
    assert f"second {short} (blocks 6:12)" in wrong.err


def test_the_error_for_an_unknown_model_lists_those_of_the_swarm(shoal, peers):
    done = shoal("status", "not a model")
    assert (done.code, done.err) == (
        1,
        "error: this swarm serves no model named not a model\nhint: it serves stories\n",
    )


def test_a_bootstrap_peer_joins_and_lets_others_join(children, shoal, peers):
    bootstrap = children.start("dht", "dht", "--host", "127.0.0.1", "--initial-peers", peers)
    ready(children, bootstrap)
    assert "stories" in shoal("status", "--initial-peers", bootstrap.facts["address"]).out
    bootstrap.process.send_signal(signal.SIGINT)
    assert bootstrap.process.wait(SECONDS) == 0


def test_two_servers_of_one_machine_have_keys_of_their_own(first, second):
    assert first.facts["peer"] != second.facts["peer"]
    kept = Path(os.environ["SHOAL_CACHE"]) / "identities"
    assert {path.name for path in kept.glob("serve-*[0-9]")} == {"serve-0", "serve-1"}


def test_a_server_that_is_stopped_announces_that_it_leaves(shoal, peers, second):
    second.process.terminate()
    assert second.process.wait(SECONDS) == 0
    lines = without_progress(second.log.read_text())
    # A busy machine makes a server correct its speed.
    told = [line for line in lines if " WARNING shoal.server.speed_watch: " not in line]
    assert told == ["leaving the swarm; a second Ctrl-C quits immediately"]
    (model,) = shoal("status", "--json").json["models"]
    assert {server["name"]: server["state"] for server in model["servers"]}["second"] == "leaving"
    assert model["missing_spans"] == ["6:12"]


UNREACHABLE = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWJ7AGY8UgbLy5iwRC5SvH8mb76vALZEcmFGykw4fRod8K"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["serve", "m"], "neither --new-swarm nor --initial-peers is given"),
        (
            ["serve", "m", "--new-swarm", "--initial-peers", UNREACHABLE],
            "--new-swarm and --initial-peers exclude each other",
        ),
        (["serve", "m", "--new-swarm", "--blocks", "8"], "not a span of blocks: '8' (write it as 0:8)"),
        (["serve", "m", "--new-swarm", "--blocks", "0:8", "--num-blocks", "2"], "--blocks and --num-blocks exclude"),
        (["generate", "m", "hi"], "which swarm?"),
        (["generate", "m"], "Missing argument 'PROMPT'"),
        (["status", "--port", "1"], "No such option"),
        (["swim"], "No such command 'swim'"),
        (["serve", "./nowhere", "--new-swarm", "--host", "127.0.0.1"], "there is no folder ./nowhere"),
        (["serve", str(STORIES), "--new-swarm", "--host", "localhost"], "not an IP address to listen on: 'localhost'"),
        (["generate", str(STORIES), "hi", "--initial-peers", "127.0.0.1:31337"], "not the address of a peer"),
    ],
)
def test_wrong_usage_gives_two_lines_and_exit_status_2(shoal, monkeypatch, arguments, error):
    monkeypatch.delenv("SHOAL_INITIAL_PEERS", raising=False)
    done = shoal(*arguments)
    assert done.code == 2
    assert done.err.startswith(f"error: {error}")
    assert [line.partition(": ")[0] for line in done.err.splitlines()] == ["error", "hint"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["serve", str(STORIES), "--initial-peers", UNREACHABLE], "no initial peer answers: " + UNREACHABLE),
        (["status", "--initial-peers", UNREACHABLE], "no initial peer answers: " + UNREACHABLE),
    ],
)
def test_a_failure_gives_two_lines_and_exit_status_1(shoal, monkeypatch, tmp_path, arguments, error):
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    done = shoal(*arguments)
    assert done.code == 1
    assert without_progress(done.err)[0].startswith(f"error: {error}")
    assert done.is_plain


def test_a_bug_gives_two_lines_too(shoal, monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", lambda seed: 1 / 0)
    monkeypatch.setattr("shoal.cli.options.swarm_peers", lambda *_, **__: 1 / 0)
    done = shoal("status", "--initial-peers", UNREACHABLE)
    assert done.code == 1
    assert done.err.splitlines() == [
        "error: ZeroDivisionError: division by zero",
        "hint: this is a bug in shoal; --verbose or SHOAL_LOG=debug prints the traceback",
    ]
    assert "Traceback" in shoal("status", "--verbose").err


# The demo.


@pytest.fixture
def demo(cache: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the demo. It ends with the test."""
    started: list[subprocess.Popen[str]] = []

    def demo(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "shoal", "demo", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(os.environ, SHOAL_CACHE=str(cache)),
        )
        started.append(process)
        return process

    yield demo
    for process in started:
        process.kill()
        process.communicate()


def line_with(process: subprocess.Popen[str], beginning: str) -> str:
    """The next line of the output with this beginning."""
    assert process.stdout is not None
    return next(line for line in process.stdout if line.startswith(beginning))


def are_gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=SECONDS)[1]


def test_the_demo_kills_a_server_and_gets_the_same_story(demo):
    process = demo("--servers", "4")
    listed = {int(entry.partition("=")[2]) for entry in line_with(process, "processes ").split()[1:]}
    line_with(process, "complete: ")
    members = psutil.Process(process.pid).children(recursive=True)
    assert listed <= {member.pid for member in members}
    assert [member.name() for member in members].count("p2pd") >= 5
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert "with SIGKILL" in out
    assert "took over after" in out
    assert "same story as the whole model on one machine: yes" in out
    assert "all processes have ended" in out
    assert err == ""
    assert are_gone(members)


@pytest.mark.parametrize(
    ("number", "codes"),
    # An interrupt during generated code makes Python end by the signal, after its cleanup: a shell sees 130 too.
    [(signal.SIGINT, {130, -signal.SIGINT}), (signal.SIGKILL, {-signal.SIGKILL})],
)
def test_an_interrupted_demo_leaves_no_process_behind(demo, number, codes):
    process = demo("--servers", "4")
    line_with(process, "processes ")
    members = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode in codes
    assert err == ""
    assert len(members) >= 5
    assert are_gone(members)


def test_a_closed_swarm_lets_those_in_who_have_its_key_or_its_code(children, shoal, tmp_path_factory):
    key = tmp_path_factory.mktemp("key") / "team.key"
    server = serve(children, "closed", "--new-swarm", "--swarm-key", str(key))
    ready(children, server)
    assert key.stat().st_mode & 0o077 == 0
    code, address = code_of(children, server), server.facts["address"]
    options = (PROMPT, "--max-new-tokens", "8", "--json")
    by_address = ("generate", str(STORIES), *options, "--initial-peers", address)
    stranger = shoal(*by_address)
    assert stranger.code == 1
    assert stranger.err.startswith("error: connected, but not to a swarm")
    assert "--swarm-key" in stranger.err
    by_code, by_key = shoal("generate", code, *options), shoal(*by_address, "--swarm-key", str(key))
    assert by_code.code == by_key.code == 0, by_code.err + by_key.err
    assert by_code.json["tokens"] == by_key.json["tokens"]
    (model,) = shoal("status", "--initial-peers", address, "--swarm-key", str(key), "--json").json["models"]
    assert [each["name"] for each in model["servers"]] == ["closed"]
    invited = shoal("invite", "--initial-peers", address, "--swarm-key", str(key))
    assert InviteCode.parse(invited.out.split()[-1]) == InviteCode.parse(code)
    twice = shoal("generate", code, PROMPT, "--swarm-key", str(key))
    assert twice.code == 2
    assert "leave out --swarm-key" in twice.err
