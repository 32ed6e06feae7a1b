"""Clients of a soak, each a process of its own, which have conversations and compare what they are answered.

    python -m benchmarks.soak_clients standby --talks FILE --seconds 300 --seed 0 --addresses ADDRESS ...

Prints a line of JSON for each sentence. `SoakClients` starts all of them and reads what they print.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import transformers

import shoal
from benchmarks.clients import generate
from benchmarks.conversations import Conversation, read_conversations
from benchmarks.soak import MODEL
from shoal import AutoDistributedModelForCausalLM
from shoal.cli.daemon import end_with_parent

START_SECONDS = 120.0


@dataclass(frozen=True)
class Kind:
    """How a client uses the model: its options, how much of a conversation it has, seconds between two turns."""

    options: dict[str, Any]
    num_turns: int
    longest_pause: float


KINDS = {
    "plain": Kind({}, num_turns=1, longest_pause=0.0),
    "standby": Kind({"standby": True}, num_turns=4, longest_pause=8.0),
    "bounded": Kind({"history_memory": 1 << 16}, num_turns=4, longest_pause=2.0),
}


@dataclass(frozen=True)
class Sentence:
    """What came of a turn: the seconds between its tokens, and what was wrong with it."""

    gaps: list[float]
    failure: str | None = None
    difference: str | None = None


def talk(name: str, addresses: list[str], talks: Sequence[Conversation], seconds: float, seed: int) -> None:
    """Have conversations for so long."""
    kind, chance, until = KINDS[name], random.Random(f"{seed} {name}"), time.monotonic() + seconds
    model = AutoDistributedModelForCausalLM.from_pretrained(
        MODEL, initial_peers=addresses, dtype=torch.float32, **kind.options
    )
    while time.monotonic() < until:
        for sentence in converse(model, chance.choice(talks)[: kind.num_turns], chance, kind.longest_pause):
            print(json.dumps(asdict(sentence)), flush=True)
    model.close()


def converse(model: Any, conversation: Conversation, chance: random.Random, longest_pause: float) -> Iterator[Sentence]:
    """A session, up to the first turn that goes wrong: what follows would, too."""
    with model.inference_session(max_length=512) as session:
        for index, turn in enumerate(conversation):
            if index:
                time.sleep(chance.uniform(0, longest_pause))
            try:
                generation = generate(model, torch.tensor([turn.said]), len(turn.answer), session=session)
            except shoal.ShoalError as error:
                yield Sentence([], failure=f"{type(error).__name__}: {error}")
                return
            gaps = [round(seconds, 4) for _, seconds in generation.gaps()]
            wrong = difference(generation.tokens, turn.answer)
            yield Sentence(gaps, difference=wrong)
            if wrong is not None:
                return


def difference(found: Sequence[int], expected: Sequence[int]) -> str | None:
    """Where tokens begin to differ, in words."""
    for index, (one, other) in enumerate(itertools.zip_longest(found, expected)):
        if one != other:
            return f"token {index} of {len(expected)} is {one}, not {other}"
    return None


@dataclass
class Talker:
    """A process that talks, and what has come of it so far."""

    name: str
    process: subprocess.Popen[str]
    sentences: list[Sentence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.sentences.append(Sentence(**json.loads(line)))

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def hear_out(self) -> None:
        """Read the last words of one that has ended."""
        if not self.is_running:
            self._reader.join()


class SoakClients:
    """One of each kind; those that still run when the context is left are killed. They log to a folder."""

    def __init__(self, addresses: Sequence[str], talks: Path, seconds: float, seed: int, logs: Path) -> None:
        self.all: list[Talker] = []
        self._logs = logs
        self._words = ["--talks", str(talks), "--seconds", str(seconds), "--seed", str(seed), "--addresses", *addresses]

    def __enter__(self) -> Self:
        for name in KINDS:
            with (self._logs / f"{name}.log").open("w") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.soak_clients", name, *self._words],
                    stdin=subprocess.PIPE,  # which ends when we do
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
            self.all.append(Talker(name, process))
        return self

    def __exit__(self, *_: object) -> None:
        for client in self.all:
            client.process.kill()
            client.process.wait()

    def wait_until_running(self) -> None:
        """Until each has had its first sentence, or has ended, or should have by now."""
        until = time.monotonic() + START_SECONDS
        while any(each.is_running and not each.sentences for each in self.all) and time.monotonic() < until:
            time.sleep(0.1)

    @property
    def are_running(self) -> bool:
        return any(each.is_running for each in self.all)

    @property
    def sentences(self) -> list[Sentence]:
        return [sentence for each in self.all for sentence in each.sentences]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--talks", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--addresses", nargs="+", required=True)
    arguments = parser.parse_args()
    end_with_parent()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    talks = read_conversations(arguments.talks)
    talk(arguments.kind, arguments.addresses, talks, arguments.seconds, arguments.seed)


if __name__ == "__main__":
    main()
