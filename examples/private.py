"""Differentially private gradients (DP-SGD, arXiv 1607.00133): the adapter depends little on any single example.

The gradient of each example is clipped to the norm `--clip`. Gaussian noise is added to their sum; its standard
deviation is `--noise` times `--clip`. Each example is drawn independently with the same probability, so batches differ
in size. Opacus computes the guarantee: the shared adapters change the odds of a guess about one example by at most a
factor of e^epsilon, except with probability `--delta`. The guarantee does not cover the servers, which compute with
every example.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from opacus.accountants import RDPAccountant

NUM_AT_ONCE = 4
"""Examples that the swarm computes at the same time, each as its own batch."""
Loss = Callable[[Sequence[Any]], torch.Tensor]


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--private", action="store_true")
    for name, default in {"--noise": 0.6, "--clip": 1.0, "--delta": 1e-4}.items():
        parser.add_argument(name, type=float, default=default)
    parser.add_argument("--noise-seed", type=int, help="makes a run repeatable; predictable noise protects nothing")


def backward(loss_of: Loss, batch: Sequence[Any], factors: Sequence[torch.Tensor], chosen: Namespace) -> float:
    """Set the gradients of the factors, and return the mean loss.

    Sums are divided by the expected batch size, because the true size is private.
    """

    def clipped(example: Any) -> tuple[float, list[torch.Tensor]]:
        loss = loss_of([example])
        gradients = torch.autograd.grad(loss, factors)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        return loss.item(), [gradient * (chosen.clip / norm).clamp(max=1) for gradient in gradients]

    losses = []
    for factor in factors:
        factor.grad = chosen.noise * chosen.clip / chosen.batch_size * torch.randn_like(factor)
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        for loss, gradients in pool.map(clipped, batch):
            losses.append(loss)
            for factor, gradient in zip(factors, gradients, strict=True):
                factor.grad += gradient / chosen.batch_size
    return sum(losses) / max(1, len(losses))


def epsilon(chosen: Namespace, *, num_examples: int) -> float:
    """The epsilon of all steps together."""
    accountant = RDPAccountant()
    for _ in range(chosen.steps):
        accountant.step(noise_multiplier=chosen.noise, sample_rate=chosen.batch_size / num_examples)
    return float(accountant.get_epsilon(chosen.delta))
