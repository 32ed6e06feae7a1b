"""Clients of the soak test `churn`. Each is a process that has conversations and checks the answers.

    python -m benchmarks.soak.clients standby --conversations FILE --seconds 300 --seed 0 --addresses ADDRESS ...

A client prints a line of JSON for each turn. `SoakClients` starts the clients and reads their lines.
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
from benchmarks.common.clients import generate
from benchmarks.common.conversations import Conversation, read_conversations
from benchmarks.soak.steady import MODEL
from shoal import AutoDistributedModelForCausalLM
from shoal.cli.service.long_running import end_with_parent

START_SECONDS = 120.0


@dataclass(frozen=True)
class Kind:
    """How a client uses the model: its options, the turns of each conversation, and the pause between two turns."""

    options: dict[str, Any]
    max_turns: int
    max_pause_seconds: float


KINDS = {
    "plain": Kind({}, max_turns=1, max_pause_seconds=0.0),
    "standby": Kind({"standby": True}, max_turns=4, max_pause_seconds=8.0),
    "bounded": Kind({"history_memory": 1 << 16}, max_turns=4, max_pause_seconds=2.0),
}


@dataclass(frozen=True)
class TurnResult:
    """The result of a turn: the seconds between its tokens, and its failure or first difference, if any."""

    gaps: list[float]
    failure: str | None = None
    difference: str | None = None


def run_client(name: str, addresses: list[str], script: Sequence[Conversation], seconds: float, seed: int) -> None:
    """Have random conversations of the script, one after another, for `seconds`."""
    kind, chance, until = KINDS[name], random.Random(f"{seed} {name}"), time.monotonic() + seconds
    model = AutoDistributedModelForCausalLM.from_pretrained(
        MODEL, initial_peers=addresses, dtype=torch.float32, salt="", **kind.options
    )
    while time.monotonic() < until:
        conversation = chance.choice(script)[: kind.max_turns]
        for result in converse(model, conversation, chance, kind.max_pause_seconds):
            print(json.dumps(asdict(result)), flush=True)
    model.close()


def converse(
    model: Any, conversation: Conversation, chance: random.Random, max_pause_seconds: float
) -> Iterator[TurnResult]:
    """Have a conversation in one session, up to the first wrong turn, after which all would be wrong."""
    with model.inference_session(max_length=512) as session:
        for index, turn in enumerate(conversation):
            if index:
                time.sleep(chance.uniform(0, max_pause_seconds))
            try:
                generation = generate(model, torch.tensor([turn.prompt]), len(turn.answer), session=session)
            except shoal.ShoalError as error:
                yield TurnResult([], failure=f"{type(error).__name__}: {error}")
                return
            gaps = [round(seconds, 4) for _, seconds in generation.gaps()]
            wrong = difference(generation.tokens, turn.answer)
            yield TurnResult(gaps, difference=wrong)
            if wrong is not None:
                return


def difference(found: Sequence[int], expected: Sequence[int]) -> str | None:
    """A sentence about the first token that differs; None if all are equal."""
    for index, (one, other) in enumerate(itertools.zip_longest(found, expected)):
        if one != other:
            return f"token {index} of {len(expected)} is {one}, not {other}"
    return None


@dataclass
class SoakClient:
    """The process of a client, and the results of its turns so far."""

    name: str
    process: subprocess.Popen[str]
    turns: list[TurnResult] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.turns.append(TurnResult(**json.loads(line)))

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def read_rest(self) -> None:
        """Read the last lines of a process that has ended."""
        if not self.is_running:
            self._reader.join()


class SoakClients:
    """One client of each kind. They are killed at the end of the context, and log to the folder `logs`."""

    def __init__(self, addresses: Sequence[str], script: Path, seconds: float, seed: int, logs: Path) -> None:
        self.all: list[SoakClient] = []
        self._logs = logs
        options = {"--conversations": script, "--seconds": seconds, "--seed": seed}
        self._options = [text for option, value in options.items() for text in (option, str(value))]
        self._options += ["--addresses", *addresses]

    def __enter__(self) -> Self:
        for name in KINDS:
            with (self._logs / f"{name}.log").open("w") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.soak.clients", name, *self._options],
                    stdin=subprocess.PIPE,  # ends with this process
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
            self.all.append(SoakClient(name, process))
        return self

    def __exit__(self, *_: object) -> None:
        for client in self.all:
            client.process.kill()
            client.process.wait()

    def wait_until_running(self) -> None:
        """Wait until each client has finished a turn or has ended, for at most `START_SECONDS`."""
        until = time.monotonic() + START_SECONDS
        while any(each.is_running and not each.turns for each in self.all) and time.monotonic() < until:
            time.sleep(0.1)

    @property
    def are_running(self) -> bool:
        return any(each.is_running for each in self.all)

    @property
    def turns(self) -> list[TurnResult]:
        return [turn for each in self.all for turn in each.turns]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--conversations", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--addresses", nargs="+", required=True)
    arguments = parser.parse_args()
    end_with_parent()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    script = read_conversations(arguments.conversations)
    run_client(arguments.kind, arguments.addresses, script, arguments.seconds, arguments.seed)


if __name__ == "__main__":
    main()
