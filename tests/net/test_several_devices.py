"""`shoal serve` with several devices, as a user runs it: a server for each in one command."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from shoal import AutoDistributedModelForCausalLM
from shoal.bundled import STORIES

from .watched_command import SECONDS, WatchedCommand

SERVE = ("serve", str(STORIES), "--new-swarm", "--host", "127.0.0.1")
PROMPT = [[1, 403, 407, 261, 378]]


@pytest.fixture(scope="module")
def machine(cache: Path) -> Iterator[WatchedCommand]:
    machine = WatchedCommand(*SERVE, "--dtype", "float32", "--device", "cpu,cpu", "--blocks", "0:12", "--name", "box")
    try:
        yield machine
    finally:
        machine.end()


def test_each_device_has_a_server_with_blocks_and_a_name_of_its_own(machine: WatchedCommand, cache: Path) -> None:
    facts = [(r"name +(\S+)", "box"), (r"blocks +(\S+)", "")]
    found = [[machine.line(rf"^\[cpu{number}\] {fact}")[1] for fact, _ in facts] for number in range(2)]
    assert found == [["box-cpu0", "0:6"], ["box-cpu1", "6:12"]]
    peers = {machine.line(rf"^\[cpu{number}\] peer +(\S+)")[1] for number in range(2)}
    assert len(peers) == 2
    assert {each.name for each in (cache / "identities").glob("serve-cpu?-0")} == {"serve-cpu0-0", "serve-cpu1-0"}


def test_a_token_goes_through_both(machine: WatchedCommand) -> None:
    machine.line(r"^\[cpu1\] code +(\S+)")
    address = machine.line(r"^\[cpu0\] address +(\S+)")[1]
    model = AutoDistributedModelForCausalLM.from_pretrained(STORIES, initial_peers=[address], dtype="float32")
    ids = torch.tensor(PROMPT)
    try:
        tokens = model.generate(ids, max_new_tokens=12, do_sample=False)
    finally:
        model.close()
    local = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    assert tokens.tolist() == local.generate(ids, max_new_tokens=12, do_sample=False).tolist()


def test_a_server_that_is_killed_is_named_and_the_other_goes_on(machine: WatchedCommand) -> None:
    first, second = machine.children()
    second.kill()
    machine.line("error: cpu1 ended with status -9.*; the others go on, and it is started again in 15 s")
    assert first.is_running()
    assert machine.process.poll() is None


def test_one_signal_ends_all_of_them(machine: WatchedCommand) -> None:
    started = psutil.Process(machine.process.pid).children(recursive=True)
    machine.process.send_signal(signal.SIGINT)
    assert machine.process.wait(SECONDS) == 0
    _, alive = psutil.wait_procs(started, timeout=SECONDS)
    assert alive == []
    assert any("leaving the swarm; a second Ctrl-C quits immediately" in line for line in machine.lines)


def test_a_mistake_that_only_the_servers_find_is_told_once_each_and_ends_the_command(cache: Path) -> None:
    machine = WatchedCommand(*SERVE, "--device", "cpu,cpu", "--blocks", "0:40")
    assert machine.process.wait(SECONDS) == 1
    machine.line("^error: cpu0 ended with status 1: .* has 12 blocks")
