"""Differentially private gradients (DP-SGD, arXiv 1607.00133): what is learnt depends little on any one example.

Each example's gradient is shortened to the length `--clip`, and to their sum comes noise `--noise` times as large.
Examples are drawn at random, each for itself and with the same probability, so that batches differ in size. Opacus says
what that is worth: what is shared changes the odds of a guess about one example by a factor of e^epsilon at most, but
for a probability of `--delta`. It is no secret to the servers, which compute with every example.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from opacus.accountants import RDPAccountant

NUM_AT_ONCE = 4
"""Examples that are on their way through the swarm at the same time: each is a batch of its own."""
Loss = Callable[[Sequence[Any]], torch.Tensor]


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--private", action="store_true")
    for name, default in {"--noise": 0.6, "--clip": 1.0, "--delta": 1e-4}.items():
        parser.add_argument(name, type=float, default=default)
    parser.add_argument("--noise-seed", type=int, help="to repeat a run; noise that can be guessed hides nothing")


def backward(loss_of: Loss, batch: Sequence[Any], factors: Sequence[torch.Tensor], chosen: Namespace) -> float:
    """Like a loss's `backward`; returns the loss. Sums are divided by the usual size of a batch, its own is private."""

    def shortened(example: Any) -> tuple[float, list[torch.Tensor]]:
        loss = loss_of([example])
        found = torch.autograd.grad(loss, factors)
        norm = torch.stack([gradient.norm() for gradient in found]).norm()
        return loss.item(), [gradient * (chosen.clip / norm).clamp(max=1) for gradient in found]

    losses = []
    for factor in factors:
        factor.grad = chosen.noise * chosen.clip / chosen.batch_size * torch.randn_like(factor)
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        for loss, found in pool.map(shortened, batch):
            losses.append(loss)
            for factor, gradient in zip(factors, found, strict=True):
                factor.grad += gradient / chosen.batch_size
    return sum(losses) / max(1, len(losses))


def epsilon(chosen: Namespace, *, num_examples: int) -> float:
    """Of all the steps together."""
    accountant = RDPAccountant()
    for _ in range(chosen.steps):
        accountant.step(noise_multiplier=chosen.noise, sample_rate=chosen.batch_size / num_examples)
    return float(accountant.get_epsilon(chosen.delta))
