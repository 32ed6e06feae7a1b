"""Real servers behind proxies: every connection takes one, and the servers can be made to fail."""

from __future__ import annotations

import logging
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
"""No step below takes this long; a test that waits for it has failed."""
PROMPT = torch.tensor([[3, 14, 15, 92, 65]])
OPTIONS = ("--dtype", "float32", "--cache-tokens", "2048")


@pytest.fixture(scope="module")
def swarm() -> Iterator[ShapedSwarm]:
    with shaped_swarm(STORIES, ["0:6", "6:12", "6:12"], options=OPTIONS, preloaded=True) as swarm:
        yield swarm


def generate(swarm: ShapedSwarm) -> list[int]:
    """The tokens that a new client generates."""
    model = AutoDistributedModelForCausalLM.from_pretrained(STORIES, initial_peers=swarm.addresses, dtype="float32")
    try:
        return model.generate(PROMPT, do_sample=False, max_new_tokens=12)[0].tolist()
    finally:
        model.close()


@pytest.fixture(scope="module")
def expected() -> list[int]:
    whole = AutoModelForCausalLM.from_pretrained(STORIES, dtype="float32")
    return whole.generate(PROMPT, do_sample=False, max_new_tokens=12)[0].tolist()


def connected_processes() -> Iterator[tuple[psutil.Process, psutil.Process | None]]:
    """Both processes of every connection of this test's libp2p daemons; None for a process of another program."""
    descendants = psutil.Process().children(recursive=True)
    owners = {
        (connection.laddr, connection.raddr): process
        for process in descendants
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_ESTABLISHED
    }
    for (here, there), process in owners.items():
        if process.name() == "p2pd":
            yield process, owners.get((there, here))


def is_proxy(process: psutil.Process | None) -> bool:
    return process is not None and "shoal.testing.proxy" in process.cmdline()


# These tests run in this order; the last ones end the servers.


def test_every_connection_takes_a_proxy(swarm, expected):
    model = AutoDistributedModelForCausalLM.from_pretrained(STORIES, initial_peers=[swarm.address], dtype="float32")
    try:
        assert model.generate(PROMPT, do_sample=False, max_new_tokens=12)[0].tolist() == expected
        daemons = [own_daemons(pid) for pid in (None, *(server.process.pid for server in swarm.servers))]
        connections = [*connected_processes()]
    finally:
        model.close()
    connected = {process.pid for process, _ in connections}
    assert all(daemons_of_one & connected for daemons_of_one in daemons)
    assert all(is_proxy(other) for _, other in connections)


def own_daemons(pid: int | None = None) -> set[int]:
    """The libp2p daemons that a process has started itself, and not by another Python; by default, this process.

    A server has a second one for a moment when it dials another server back, or looks for its own identity.
    """
    shells = [child for child in psutil.Process(pid).children() if not child.name().startswith("python")]
    return {each.pid for shell in shells for each in (shell, *shell.children()) if each.name() == "p2pd"}


def test_two_models_of_one_process_share_a_daemon_and_a_thread_until_the_last_is_closed(swarm, expected):
    assert not own_daemons()
    models = [
        AutoDistributedModelForCausalLM.from_pretrained(STORIES, initial_peers=[swarm.address], dtype="float32")
        for _ in range(2)
    ]
    try:
        assert len(own_daemons()) == 1
        assert [thread.name for thread in threading.enumerate()].count("shoal-client") == 1
        models[0].close()
        assert models[1].generate(PROMPT, do_sample=False, max_new_tokens=12)[0].tolist() == expected
    finally:
        for model in models:
            model.close()
    assert not own_daemons()
    assert "shoal-client" not in [thread.name for thread in threading.enumerate()]


def test_a_batch_that_takes_long_to_send_loses_no_server(swarm, caplog: pytest.LogCaptureFixture):
    """Each message takes seconds, and pings and announcements share its links."""
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


def test_a_restarted_server_is_the_same_peer_behind_the_same_proxy(swarm, expected):
    server = swarm.servers[0]
    address, pid = server.address, server.process.pid
    server.kill()
    assert not server.is_running
    server.restart()
    assert server.address == address
    assert server.process.pid != pid
    assert generate(swarm) == expected
    assert all(is_proxy(other) for _, other in connected_processes())


@pytest.mark.parametrize("failure", ["cut", "black_hole", "hang"])
def test_generation_survives_a_failure_of_one_of_two_servers(swarm, expected, failure):
    server, cure = swarm.servers[1], "resume" if failure == "hang" else "heal"
    getattr(server, failure)()
    try:
        assert generate(swarm) == expected
    finally:
        getattr(server, cure)()


def test_a_proxy_counts_the_bytes_that_it_forwards(swarm, expected):
    server = swarm.servers[0]
    before = server.traffic
    server.link(Link(delay_seconds=0.005), Link())
    assert generate(swarm) == expected
    server.link(Link())
    after = server.traffic
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


def test_no_process_is_left_when_the_swarms_owner_is_killed_while_a_server_hangs():
    script = (
        "from shoal.testing import shaped_swarm\n"
        f"with shaped_swarm({str(STORIES)!r}, ['0:12'], options={OPTIONS}) as swarm:\n"
        "    swarm.servers[0].hang()\n"
        "    print(flush=True)\n"
        "    input()\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        descendants = psutil.Process(owner.pid).children(recursive=True)
        names = {process.name() for process in descendants}
        owner.kill()
    assert names >= {"p2pd", "sh"}
    assert not psutil.wait_procs(descendants, timeout=SECONDS)[1]
