"""The process of an honest client: `python -m benchmarks.abuse.honest_client SECONDS ADDRESS ...`.

It joins the swarm and generates short texts, each in a session of its own, for as long as it is told. Then it prints a
line of JSON, an `Experience`.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers

import shoal
from benchmarks.common.clients import generate
from shoal import AutoDistributedModelForCausalLM
from shoal.bundled import STORIES
from shoal.cli.service.long_running import end_with_parent

NUM_TOKENS = 32
"""Of one text: short, so that sessions and streams are opened all the time."""


@dataclass(frozen=True)
class Experience:
    """What the client had: tokens, in how many seconds with joining, and the longest time between two of them.

    `first` is when the first token came, in seconds from when it began to join, or all `seconds` if none came.
    `failures` are the errors that it was told.
    """

    num_tokens: int
    seconds: float
    first: float
    longest_gap: float
    failures: tuple[str, ...] = ()

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.num_tokens / self.seconds


class HonestClient:
    """Generates all the time. `experience` is what it had until now."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._arrivals: list[float] = []
        self._failures: dict[str, None] = {}

    def generate(self, model: Any) -> None:
        """Generate without end."""
        for prompt in itertools.cycle(([5, 17, 42, 9, 33], [7, 11, 13], [301, 302, 4, 88])):
            try:
                generate(model, torch.tensor([prompt]), NUM_TOKENS, came=self._came)
            except shoal.ShoalError as error:
                self._failures[f"{type(error).__name__}: {error}"] = None

    def _came(self, _: int) -> None:
        self._arrivals.append(time.perf_counter())

    def experience(self) -> Experience:
        """The time until the first token of a later text is a gap too, and so is that since the last one."""
        now = time.perf_counter()
        arrivals = [*self._arrivals, now]
        longest = max((later - earlier for earlier, later in itertools.pairwise(arrivals)), default=0.0)
        first = arrivals[0] - self._began
        return Experience(len(self._arrivals), now - self._began, first, longest, tuple(self._failures))


def main() -> None:
    seconds, *addresses = sys.argv[1:]
    end_with_parent()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    client = HonestClient()

    def tell() -> None:
        print(json.dumps(asdict(client.experience())), flush=True)
        os._exit(0)  # also in the middle of a token that does not come

    threading.Timer(float(seconds), tell).start()
    client.generate(
        AutoDistributedModelForCausalLM.from_pretrained(STORIES, initial_peers=addresses, dtype=torch.float32)
    )


if __name__ == "__main__":
    main()
