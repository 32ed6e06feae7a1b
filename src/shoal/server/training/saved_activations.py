"""The activations that a server saves in forward passes, for the backward passes that follow.

PyTorch saves what each operator needs for its gradient: about fifty times a block's inputs. A server saves as much of
that as its budget allows, and computes the rest again. For that it needs the inputs of each block, which it also saves,
or the inputs of the pass, which the client has.
"""

# B sequences, T tokens, D hidden size

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Set
from dataclasses import dataclass, field

import torch

from shoal.model.body import Body
from shoal.model.peft.block_adapters import BlockAdapter
from shoal.server.training.pass_blocks import PassBlocks


@dataclass
class BlockActivations:
    """One block of one pass: its inputs, and its outputs with their autograd graph, or `None` if that was dropped.

    `num_bytes` is how much memory it takes.
    """

    inputs_BTD: torch.Tensor
    outputs_BTD: torch.Tensor | None
    num_bytes: int

    def drop_graph(self) -> None:
        """Keep only the inputs."""
        self.outputs_BTD, self.num_bytes = None, self.inputs_BTD.nbytes


class ByteBudget:
    """At most `max_bytes` bytes, reserved on the compute thread and released on any thread."""

    def __init__(self, max_bytes: int) -> None:
        self.used_bytes = 0
        self._max_bytes = max_bytes
        self._lock = threading.Lock()

    def reserve(self, num_bytes: int) -> bool:
        """Reserve bytes, if that many are left. Returns whether they were."""
        with self._lock:
            fits = self.used_bytes + num_bytes <= self._max_bytes
            self.used_bytes += num_bytes * fits
            return fits

    def release(self, num_bytes: int) -> None:
        """Give reserved bytes back."""
        with self._lock:
            self.used_bytes -= num_bytes


@dataclass(eq=False)
class SavedActivations:
    """The activations of one pass, block after block in `of_blocks`.

    It `is_complete` if the budget had room for the inputs of every block.
    """

    blocks: PassBlocks
    budget: ByteBudget
    of_blocks: list[BlockActivations] = field(default_factory=list)
    is_dropped: bool = False
    is_complete: bool = True
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, activations: BlockActivations) -> None:
        """Save the next block's activations: all if the budget allows, or the inputs only.

        The inputs are added in any case, since a backward pass may follow at once. But they are `is_complete` only
        within the budget, and a pass that is not is never stored for later.
        """
        with self._lock:  # another thread may drop the pass now
            if self.is_dropped or not self.budget.reserve(activations.num_bytes):
                activations.drop_graph()
                if self.is_dropped or not self.budget.reserve(activations.num_bytes):
                    activations.num_bytes, self.is_complete = 0, False
            self.of_blocks.append(activations)

    def pop(self) -> BlockActivations:
        """Remove the last block's activations from the budget. The caller computes with them at once."""
        activations = self.of_blocks.pop()
        self.budget.release(activations.num_bytes)
        return activations

    def drop(self) -> None:
        """Release everything: no backward pass will follow. May be called twice."""
        with self._lock:
            self.is_dropped = True
        with contextlib.suppress(IndexError):
            while True:
                self.pop()


class ActivationStore:
    """The activations of clients' passes, by the client's peer id and the id that it gave to the pass.

    When a new pass begins, the store drops those that were saved more than `seconds` ago.
    """

    def __init__(self, body: Body, *, max_bytes: int, seconds: float) -> None:
        self.weight_pointers = frozenset(parameter.untyped_storage().data_ptr() for parameter in body.parameters())
        self.budget = ByteBudget(max_bytes)
        self._seconds = seconds
        self._clock = asyncio.get_running_loop().time
        self._passes: dict[tuple[str, str], tuple[float, SavedActivations]] = {}

    def __len__(self) -> int:
        return len(self._passes)

    def new(self, blocks: PassBlocks) -> SavedActivations:
        """The activations of a pass that begins now, still empty."""
        now = self._clock()
        for key, (saved_at, old) in list(self._passes.items()):
            if now - saved_at > self._seconds:
                old.drop()
                del self._passes[key]
        return SavedActivations(blocks, self.budget)

    def save(self, peer: str, pass_id: str, activations: SavedActivations) -> None:
        """Store the activations of a pass, in place of an earlier pass of the same id."""
        if (replaced := self.take(peer, pass_id)) is not None:
            replaced.drop()
        self._passes[peer, pass_id] = self._clock(), activations

    def has(self, peer: str, pass_id: str) -> bool:
        """Whether there are activations of a pass of this client."""
        return (peer, pass_id) in self._passes

    def take(self, peer: str, pass_id: str) -> SavedActivations | None:
        """Remove and return the activations of a pass of this client, or `None` if there are none."""
        found = self._passes.pop((peer, pass_id), None)
        return None if found is None else found[1]

    def release(self, peer: str) -> None:
        """Drop all passes of a client, which is gone."""
        for key in [key for key in self._passes if key[0] == peer]:
            self._passes.pop(key)[1].drop()

    def drop_adapters(self, adapters: Collection[BlockAdapter]) -> None:
        """Drop the passes that were computed with any of these adapters."""
        for key, (_, activations) in list(self._passes.items()):
            if any(adapter in adapters for adapter in activations.blocks.adapters.values()):
                self._passes.pop(key)[1].drop()


@contextlib.contextmanager
def counting_saved_bytes(weight_pointers: Set[int]) -> Iterator[Callable[[], int]]:
    """Count the bytes that autograd saves while the context lasts, except those of the weights."""
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weight_pointers:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an operator that saves its own output would form a cycle that gc does not see

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield lambda: sum(sizes.values())
