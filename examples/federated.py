"""Federated averaging (FedAvg, arXiv 1602.05629), with a coordinator and a process for each participant."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

Average = Callable[[], object]  # replaces a participant's factors by the mean of all participants' factors


@contextmanager
def participants(count: int, participate: Callable[..., None], *arguments: Any) -> Iterator[list[Connection]]:
    """Run `participate(number, connection, *arguments)` in `count` processes. Yields our ends of their connections."""
    context = multiprocessing.get_context("fork")  # hivemind uses fork too
    processes, connections = [], []
    for number in range(count):
        ours, theirs = context.Pipe()
        connections.append(ours)
        processes.append(context.Process(target=participate, args=(number, theirs, *arguments)))
        processes[-1].start()
        theirs.close()  # so that our end notices when the process ends
    try:
        yield connections
    except BaseException:
        for process in processes:
            process.terminate()
        raise


def receive(connections: Sequence[Connection]) -> list[Any]:
    """The next message of each participant. Raises `EOFError` as soon as one has ended."""
    received: dict[Connection, Any] = {}
    while pending := [connection for connection in connections if connection not in received]:
        for connection in wait(pending):
            received[connection] = connection.recv()
    return [received[connection] for connection in connections]


def coordinate(connections: Sequence[Connection], *, rounds: int) -> None:
    """In each round, receive the factors of all participants and send their mean to each."""
    for _ in range(rounds):
        means = [sum(factors) / len(factors) for factors in zip(*receive(connections), strict=True)]
        for connection in connections:
            connection.send(means)


@contextmanager
def by_coordinator(factors: Sequence[torch.Tensor], coordinator: Connection) -> Iterator[Average]:
    """A participant's side of the averaging."""

    def average() -> None:
        coordinator.send([factor.detach().numpy() for factor in factors])
        for factor, mean in zip(factors, coordinator.recv(), strict=True):
            factor.data.copy_(torch.from_numpy(mean))

    yield average
