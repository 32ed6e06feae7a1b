"""Real servers behind doors: that nobody gets around them, and what may be done to the servers."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from shoal import AutoDistributedModelForCausalLM
from shoal.bundled import STORIES
from shoal.testing import Link, ShapedSwarm, shaped_swarm

SECONDS = 120.0
"""Nothing below takes that long; a test that waits for it has failed."""
PROMPT = torch.tensor([[3, 14, 15, 92, 65]])
OPTIONS = ("--dtype", "float32", "--cache-tokens", "2048")


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShapedSwarm]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        with shaped_swarm(STORIES, ["0:6", "6:12", "6:12"], options=OPTIONS) as swarm:
            yield swarm


def generate(swarm: ShapedSwarm) -> list[int]:
    """What a client says that joins for it."""
    model = AutoDistributedModelForCausalLM.from_pretrained(STORIES, initial_peers=swarm.addresses, dtype="float32")
    try:
        return model.generate(PROMPT, do_sample=False, max_new_tokens=12)[0].tolist()
    finally:
        model.close()


@pytest.fixture(scope="module")
def expected() -> list[int]:
    whole = AutoModelForCausalLM.from_pretrained(STORIES, dtype="float32")
    return whole.generate(PROMPT, do_sample=False, max_new_tokens=12)[0].tolist()


def who_talks_to_whom() -> Iterator[tuple[psutil.Process, psutil.Process | None]]:
    """The two processes of every connection of a libp2p daemon of ours; None for one that is not ours."""
    family = psutil.Process().children(recursive=True)
    owners = {
        (connection.laddr, connection.raddr): process
        for process in family
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_ESTABLISHED
    }
    for (here, there), process in owners.items():
        if process.name() == "p2pd":
            yield process, owners.get((there, here))


def is_proxy(process: psutil.Process | None) -> bool:
    return process is not None and "shoal.testing.proxy" in process.cmdline()


# These tests run in this order: in the end the servers are gone.


def test_every_connection_passes_a_door(swarm, expected):
    model = AutoDistributedModelForCausalLM.from_pretrained(STORIES, initial_peers=[swarm.address], dtype="float32")
    try:
        assert model.generate(PROMPT, do_sample=False, max_new_tokens=12)[0].tolist() == expected
        talks = [*who_talks_to_whom()]
    finally:
        model.close()
    assert len({process.pid for process, _ in talks}) == 4
    assert all(is_proxy(other) for _, other in talks)


def num_daemons() -> int:
    """How many libp2p daemons run for this process and its servers."""
    return [each.name() for each in psutil.Process().children(recursive=True)].count("p2pd")


def test_two_models_of_one_process_share_a_daemon_and_a_thread_until_the_last_is_closed(swarm, expected):
    num_before = num_daemons()
    models = [
        AutoDistributedModelForCausalLM.from_pretrained(STORIES, initial_peers=[swarm.address], dtype="float32")
        for _ in range(2)
    ]
    try:
        assert num_daemons() == num_before + 1
        assert [thread.name for thread in threading.enumerate()].count("shoal-client") == 1
        models[0].close()
        assert models[1].generate(PROMPT, do_sample=False, max_new_tokens=12)[0].tolist() == expected
    finally:
        for model in models:
            model.close()
    assert num_daemons() == num_before
    assert "shoal-client" not in [thread.name for thread in threading.enumerate()]


def test_a_batch_that_is_long_on_its_way_loses_no_server(swarm, caplog: pytest.LogCaptureFixture):
    """Each message takes seconds, and pings and announcements go over the same links."""
    tokens = torch.arange(32 * 128).view(32, 128) % 200 + 3
    whole = AutoModelForCausalLM.from_pretrained(STORIES, dtype="float32")
    whole(input_ids=tokens, labels=tokens).loss.backward()
    expected = whole.get_input_embeddings().weight.grad
    model = AutoDistributedModelForCausalLM.from_pretrained(STORIES, initial_peers=swarm.addresses, dtype="float32")
    try:
        for server in swarm.servers:
            server.link(Link(bytes_per_second=700e3))
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        gradient = model.get_input_embeddings().weight.grad
    finally:
        for server in swarm.servers:
            server.link(Link())
        model.close()
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_server_that_is_killed_and_started_again_is_the_same_peer_behind_the_same_door(swarm, expected):
    server = swarm.servers[0]
    before, peer = server.address, server.process.pid
    server.kill()
    assert not server.is_running
    server.restart()
    assert (server.address, server.process.pid != peer) == (before, True)
    assert generate(swarm) == expected
    assert all(is_proxy(other) for _, other in who_talks_to_whom())


@pytest.mark.parametrize("harm", ["cut", "black_hole", "hang"])
def test_a_sentence_is_finished_whatever_is_done_to_one_of_two(swarm, expected, harm):
    server, cure = swarm.servers[1], "resume" if harm == "hang" else "heal"
    getattr(server, harm)()
    try:
        assert generate(swarm) == expected
    finally:
        getattr(server, cure)()


def test_bytes_are_counted_where_they_pass(swarm, expected):
    proxy = swarm.servers[0]
    before = proxy.traffic
    proxy.link(Link(delay_seconds=0.005), Link())
    assert generate(swarm) == expected
    proxy.link(Link())
    after = proxy.traffic
    assert after.num_connections > before.num_connections
    assert after.inward_bytes - before.inward_bytes > 12 * 768
    assert after.outward_bytes - before.outward_bytes > 12 * 768


def test_a_server_that_is_told_to_stop_leaves(swarm):
    server = swarm.servers[2]
    server.stop()
    assert server.process.returncode == 0
    assert "leaving the swarm" in server.log


def test_a_server_that_hangs_is_stopped_by_the_system_until_it_is_resumed(swarm):
    server = swarm.servers[1]
    process = psutil.Process(server.process.pid)
    server.hang()
    assert process.status() == psutil.STATUS_STOPPED
    server.resume()
    assert process.status() != psutil.STATUS_STOPPED


def test_a_server_that_hangs_can_be_killed(swarm):
    server = swarm.servers[1]
    server.hang()
    server.kill()
    assert server.process.returncode == -9


def test_nothing_is_left_when_the_swarms_owner_is_killed_while_a_server_hangs(tmp_path):
    script = (
        "from shoal.testing import shaped_swarm\n"
        f"with shaped_swarm({str(STORIES)!r}, ['0:12'], options={OPTIONS}) as swarm:\n"
        "    swarm.servers[0].hang()\n"
        "    print(flush=True)\n"
        "    input()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=dict(os.environ, SHOAL_CACHE=str(tmp_path)),
    )
    with owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        family = psutil.Process(owner.pid).children(recursive=True)
        owner.kill()
    assert {process.name() for process in family} >= {"p2pd", "sh"}
    assert not psutil.wait_procs(family, timeout=SECONDS)[1]
