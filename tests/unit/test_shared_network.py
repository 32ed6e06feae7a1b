"""Models of one process that join in the same way share a node."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from shoal.client.shared_network import join_shared
from shoal.errors import BootstrapFailed
from shoal.net import NetworkConfig
from shoal.net.memory import MemoryNetwork
from shoal.net.transport import Node

CONFIG = NetworkConfig(initial_peers=("/a",), client_mode=True)


class Network:
    """Counts the nodes that join and leave. `failures` are raised by the next attempts to join."""

    def __init__(self) -> None:
        self.network = MemoryNetwork()
        self.failures: list[Exception] = []
        self.joined: list[NetworkConfig] = []
        self.num_left = 0

    @contextlib.asynccontextmanager
    async def join(self, config: NetworkConfig) -> AsyncIterator[Node]:
        if self.failures:
            raise self.failures.pop()
        self.joined.append(config)
        node = self.network.node(f"client{len(self.joined)}")
        try:
            yield node
        finally:
            self.num_left += 1
            await node.transport.close()


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    network = Network()
    monkeypatch.setattr("shoal.client.shared_network.join", network.join)
    yield network
    assert network.num_left == len(network.joined)
    assert "shoal-client" not in [thread.name for thread in threading.enumerate()]


def test_the_same_network_is_joined_once_and_left_with_the_last(network: Network):
    first, node = join_shared(CONFIG)
    second, same = join_shared(CONFIG)
    assert node is same
    assert first.loop is second.loop
    first.close()
    assert network.num_left == 0
    second.close()
    assert network.num_left == 1
    third, other = join_shared(CONFIG)
    assert other is not node
    third.close()


def test_networks_that_are_joined_by_other_peers_are_apart(network: Network):
    first, node = join_shared(CONFIG)
    second, other = join_shared(NetworkConfig(initial_peers=("/b",), client_mode=True))
    assert node is not other
    assert first.thread is not second.thread
    first.close()
    second.close()


def test_models_that_are_opened_at_the_same_time_share_a_node(network: Network):
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: join_shared(CONFIG), range(4)))
    assert len({id(node) for _, node in opened}) == len(network.joined) == 1
    for runtime, _ in opened:
        runtime.close()


def test_a_network_that_could_not_be_joined_is_tried_again(network: Network):
    network.failures = [BootstrapFailed("none of the initial peers answers")]
    with pytest.raises(BootstrapFailed):
        join_shared(CONFIG)
    runtime, _ = join_shared(CONFIG)
    runtime.close()
