"""The same mean with nobody in charge: participants find each other in a hash table, and hivemind averages."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection

import torch
from federated import Average
from hivemind import DHT, DecentralizedAverager

TIMEOUT = 300.0
"""Seconds until all have come together: they compute at different speeds."""


@contextmanager
def introduced(connections: Sequence[Connection]) -> Iterator[None]:
    """Have a hash table, and let everybody know where."""
    dht = DHT(start=True)
    for connection in connections:
        connection.send(([str(address) for address in dht.get_visible_maddrs()], len(connections)))
    yield
    dht.shutdown()


@contextmanager
def by_hivemind(factors: Sequence[torch.Tensor], parent: Connection) -> Iterator[Average]:
    """A participant's side of it."""
    addresses, count = parent.recv()
    dht = DHT(addresses, start=True)
    tensors = [factor.data for factor in factors]  # changed in place, by a process of hivemind's
    averager = DecentralizedAverager(tensors, dht, prefix="adapter", target_group_size=count, start=True)
    try:
        yield lambda: averager.step(timeout=TIMEOUT)
    finally:
        averager.shutdown()
        dht.shutdown()
