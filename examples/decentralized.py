"""The mean of all adapters without a coordinator: participants meet in a hash table, and hivemind averages."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection

import torch
from federated import Average
from hivemind import DHT, DecentralizedAverager

TIMEOUT = 300.0
"""Seconds to wait for the slowest participant."""


@contextmanager
def hash_table(connections: Sequence[Connection]) -> Iterator[None]:
    """Run a hash table, and send its address to all participants."""
    dht = DHT(start=True)
    for connection in connections:
        connection.send(([str(address) for address in dht.get_visible_maddrs()], len(connections)))
    yield
    dht.shutdown()


@contextmanager
def by_hivemind(factors: Sequence[torch.Tensor], parent: Connection) -> Iterator[Average]:
    """A participant's side of the averaging."""
    addresses, count = parent.recv()
    dht = DHT(addresses, start=True)
    tensors = [factor.data for factor in factors]  # a process of hivemind changes them in place
    averager = DecentralizedAverager(tensors, dht, prefix="adapter", target_group_size=count, start=True)
    try:
        yield lambda: averager.step(timeout=TIMEOUT)
    finally:
        averager.shutdown()
        dht.shutdown()
