"""What the training benchmarks share: models, LoRA training, and tables of results."""

# B sequences, T tokens

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.common.clients import median
from shoal import AutoDistributedModelForCausalLM

RANK = 8
NUM_TOKENS = 128
"""Tokens of a sequence."""


@dataclass(frozen=True)
class Table:
    """The results of a part of the benchmark. The last value of a row is whether its goal is met; None: no goal."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | bool | None, ...], ...]

    def print(self) -> None:
        print(f"### {self.title}\n")
        print("| " + " | ".join((*self.columns, "")) + " |")
        print("|---" * (len(self.columns) + 1) + "|")
        for row in self.rows:
            print("| " + " | ".join(map(_cell, row)) + " |")
        print(flush=True)

    @property
    def is_met(self) -> bool:
        return all(row[-1] is not False for row in self.rows)


def _cell(value: str | float | bool | None) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "met" if value else "missed"
        case float():
            return f"{value:.3g}"
    return str(value)


def speed_table(title: str, rows: Sequence[tuple[str, Sequence[tuple[float, float]], float]]) -> Table:
    """A table of rows with a name, the speeds of both sides in each round, and the goal for their median ratio."""
    return Table(
        title,
        ("what", "tokens/s", "compared with", "ratio", "goal"),
        tuple(
            (
                name,
                median([mine for mine, _ in rounds]),
                median([other for _, other in rounds]),
                ratio := median([mine / other for mine, other in rounds]),
                f"≥ {goal:g}",
                ratio >= goal,
            )
            for name, rounds, goal in rows
        ),
    )


class Tuner:
    """A model with LoRA factors on all linear layers of its blocks, and an optimizer. The seed is fixed."""

    def __init__(self, model: Any, *, learning_rate: float = 1e-4) -> None:
        torch.manual_seed(0)
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(model, config)
        self.parameters = {name: each for name, each in self.model.named_parameters() if each.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=learning_rate)

    def loss(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
        return loss

    def step(self, tokens_BT: torch.Tensor) -> None:
        self.loss(tokens_BT).backward()
        self.update()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def forward(self, tokens_BT: torch.Tensor) -> None:
        self.model(input_ids=tokens_BT, use_cache=False)


def local_model(folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    """The whole model on this machine."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def client(folder: Path, addresses: str | list[str], dtype: torch.dtype, **options: Any) -> Any:
    """The model with its blocks in a swarm. The caller closes it."""
    return AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=addresses, dtype=dtype, **options)


def tokens_of(model: Any, batch_size: int, seed: int, num_tokens: int = NUM_TOKENS) -> torch.Tensor:
    """Random tokens [B, T]. Their values do not affect the speed."""
    chance = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (batch_size, num_tokens), generator=chance)


def speed(act: Callable[[torch.Tensor], None], tokens_BT: torch.Tensor) -> float:
    """Tokens per second."""
    began = time.perf_counter()
    act(tokens_BT)
    return tokens_BT.numel() / (time.perf_counter() - began)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference, divided by the norm of `expected`."""
    difference = found.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


def log(text: str) -> None:
    """Print a line of progress to stderr."""
    print(text, file=sys.stderr, flush=True)
