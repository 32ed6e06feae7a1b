"""The jobs: generations of remote clients, drawn from stated distributions or read from a trace.

The lengths of prompts and answers are log-normal, which is about what chats have: many short ones, a few long ones.
`chat` has the means of ShareGPT's conversations, 161 and 338 tokens, `instructions` those of Alpaca's, 19 and 58 (both
as in the paper of vLLM, arXiv 2309.06180, figure 11; the spread is ours). Lengths beyond the largest are cut to it.
Arrivals are a Poisson process. A client's seconds away between an answer and its next step are uniform, and those of
each step differ from them by up to a tenth.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from shoal.errors import UserError

AWAY_SECONDS = (0.05, 0.25)
"""The least and the most that a client's token is away: on the rest of its ring, and in the client."""
AWAY_SPREAD = 0.1
"""By what part the seconds of a step differ from the usual ones of its job, up or down."""
MAX_TOKENS = 1 << 20
"""The most tokens of a prompt or an answer in a trace."""
COLUMNS = ("seconds", "prompt", "answer")
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
"""The columns of Azure's public traces of language models, which are read too."""


@dataclass(frozen=True)
class Generation:
    """A job: it arrives at `arrives_at` seconds with a prompt, and wants `num_answer` tokens, at most `max_answer`.

    The server knows `max_answer`, and not `num_answer`. `peer` is the client; each job has its own unless stated.
    """

    number: int
    arrives_at: float
    num_prompt: int
    num_answer: int
    max_answer: int
    away_seconds: float
    seed: str
    peer: str = ""

    @property
    def max_tokens(self) -> int:
        """The most tokens that a server may be asked to compute: the last token of an answer is sent to no server."""
        return self.num_prompt + self.max_answer - 1

    def seconds_away(self) -> Iterator[float]:
        """The seconds between each answer and the next step, always the same ones for a job."""
        chance = random.Random(f"{self.seed} {self.number}")  # noqa: S311 - not for secrets
        while True:
            yield self.away_seconds * chance.uniform(1 - AWAY_SPREAD, 1 + AWAY_SPREAD)


@dataclass(frozen=True)
class Lengths:
    """Log-normal numbers of tokens: the mean before they are cut, the spread of the logarithm, the largest."""

    mean: float
    spread: float
    largest: int

    def draw(self, chance: random.Random) -> int:
        """A number of tokens, drawn at random; at least 1 and at most `largest`."""
        drawn = chance.lognormvariate(math.log(self.mean) - self.spread**2 / 2, self.spread)
        return max(1, min(self.largest, round(drawn)))


@dataclass(frozen=True)
class Workload:
    """The lengths of prompts and answers."""

    prompts: Lengths
    answers: Lengths


WORKLOADS = {
    "chat": Workload(Lengths(161.0, 1.2, 2048), Lengths(338.0, 0.9, 1024)),
    "instructions": Workload(Lengths(19.3, 0.6, 256), Lengths(58.5, 0.9, 512)),
}


def generations(workload: Workload, num_jobs: int, *, rate: float, seed: int) -> list[Generation]:
    """Jobs that arrive at this mean rate, in jobs per second. Equal seeds give jobs of equal lengths at any rate."""
    chance = random.Random(f"generations {seed}")  # noqa: S311
    jobs: list[Generation] = []
    now = 0.0
    for number in range(num_jobs):
        now += chance.expovariate(1.0) / rate
        job = Generation(
            number,
            now,
            workload.prompts.draw(chance),
            workload.answers.draw(chance),
            workload.answers.largest,
            chance.uniform(*AWAY_SECONDS),
            seed=str(seed),
            peer=f"client {number}",
        )
        jobs.append(job)
    return jobs


def at_rate(jobs: Sequence[Generation], rate: float) -> list[Generation]:
    """The same jobs, their arrivals stretched or pressed to this mean rate."""
    span = jobs[-1].arrives_at - jobs[0].arrives_at
    factor = len(jobs) / (rate * span) if span > 0 else 1.0
    return [replace(job, arrives_at=(job.arrives_at - jobs[0].arrives_at) * factor) for job in jobs]


def read_trace(path: Path, *, max_jobs: int, seed: int) -> list[Generation]:
    """The jobs of a CSV file with the columns seconds, prompt, answer, or with those of Azure's public traces.

    Times are seconds from any beginning, or timestamps; lengths are tokens. Raises `UserError` for another file.
    """
    chance = random.Random(f"trace {seed}")  # noqa: S311
    jobs: list[Generation] = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns = next(
                (each for each in (COLUMNS, AZURE_COLUMNS) if set(each) <= set(reader.fieldnames or ())), None
            )
            if columns is None:
                raise UserError(
                    f"{path} has not the columns {', '.join(COLUMNS)}",
                    hint="the first line of a trace names its columns",
                )
            for row in reader:
                if len(jobs) == max_jobs:
                    break
                seconds, prompt, answer = (row[column] or "" for column in columns)
                jobs.append(_job(len(jobs), _seconds(seconds), int(prompt), int(answer), chance, seed))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", hint="--trace names a CSV file") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"line {len(jobs) + 2} of {path}: {error}", hint=f"columns: {', '.join(COLUMNS)}") from error
    jobs.sort(key=lambda job: job.arrives_at)
    if len(jobs) < 2:
        raise UserError(f"{path} has fewer than two jobs", hint="a trace has a line for each job")
    return [replace(job, number=number, peer=f"client {number}") for number, job in enumerate(jobs)]


def _job(number: int, arrives_at: float, prompt: int, answer: int, chance: random.Random, seed: int) -> Generation:
    if not (1 <= prompt <= MAX_TOKENS and 1 <= answer <= MAX_TOKENS and math.isfinite(arrives_at)):
        raise ValueError(f"a prompt of {prompt} and an answer of {answer} tokens at {arrives_at}")
    largest = 1 << (answer - 1).bit_length()  # clients ask for round numbers
    return Generation(number, arrives_at, prompt, answer, largest, chance.uniform(*AWAY_SECONDS), seed=str(seed))


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text[:26]).replace(tzinfo=UTC).timestamp()
