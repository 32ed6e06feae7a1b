"""Federated averaging (FedAvg, arXiv 1602.05629): participants, each in a process of its own, and a coordinator."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

Average = Callable[[], object]  # puts the mean of all participants' factors in the place of one's own


@contextmanager
def participants(count: int, participate: Callable[..., None], *arguments: Any) -> Iterator[list[Connection]]:
    """Let so many `participate(number, connection, *arguments)`; yields the other ends of their connections."""
    context = multiprocessing.get_context("fork")  # as hivemind starts its own
    processes, connections = [], []
    for number in range(count):
        ours, theirs = context.Pipe()
        connections.append(ours)
        processes.append(context.Process(target=participate, args=(number, theirs, *arguments)))
        processes[-1].start()
        theirs.close()  # so that it is noticed here when they end
    try:
        yield connections
    except BaseException:
        for process in processes:
            process.terminate()
        raise


def receive(connections: Sequence[Connection]) -> list[Any]:
    """What each of them sends next. Raises `EOFError` as soon as one has ended instead."""
    found: dict[Connection, Any] = {}
    while waiting := [connection for connection in connections if connection not in found]:
        for connection in wait(waiting):
            found[connection] = connection.recv()
    return [found[connection] for connection in connections]


def coordinate(connections: Sequence[Connection], *, rounds: int) -> None:
    """In each round, take everybody's factors and give everybody their mean."""
    for _ in range(rounds):
        means = [sum(factors) / len(factors) for factors in zip(*receive(connections), strict=True)]
        for connection in connections:
            connection.send(means)


@contextmanager
def by_coordinator(factors: Sequence[torch.Tensor], coordinator: Connection) -> Iterator[Average]:
    """A participant's side of it."""

    def average() -> None:
        coordinator.send([factor.detach().numpy() for factor in factors])
        for factor, mean in zip(factors, coordinator.recv(), strict=True):
            factor.data.copy_(torch.from_numpy(mean))

    yield average
