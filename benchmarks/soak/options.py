"""How a soak of conversations begins: its options, and what its clients say."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers

from benchmarks.common.conversations import Conversation, conversations
from benchmarks.common.machine import describe_machine
from benchmarks.soak.steady import MODEL


def soak_parser(description: str | None, *, every: float, event: str) -> argparse.ArgumentParser:
    """A parser of what every soak can be told. An `event` happens once in `every` seconds, on average."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--every", type=float, default=every, help=f"seconds from one {event} to the next, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, help="a new folder for the logs of all processes")
    return parser


def soak_script(number: int, *, seed: int) -> list[Conversation]:
    """What the clients say, with the right answers. Prints the machine, and lets PyTorch use one thread."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(describe_machine(), flush=True)
    return conversations(MODEL, number, seed=seed)
