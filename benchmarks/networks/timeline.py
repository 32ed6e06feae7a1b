"""Where the time of one round goes: a plain step and one with guesses, through four servers 100 ms apart.

    python -m benchmarks.networks.timeline [--model MODEL] [--tokens 120] [--acceptance 0.85]
                                           [--out docs/images/round.svg]

Four servers, a process each, behind links of 50 ms one way and 100 Mbit/s (docs/testing.md). The client generates a
story plainly, and again with a draft of which that share of the guesses is right. Servers say in their logs when they
have computed a pass and for how long; the client records when it sends a step and has its answer. All processes read
the same clock. Of each kind, the step of median length is drawn, and the medians of all steps are printed.

"Trips" is what passes between the end of one computation and the beginning of the next: light and bytes on five links,
and everything that is neither a pass nor the client's own work.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.common.machine import describe_machine
from benchmarks.speculation import NUM_STAGES, START, KnownText, tell
from shoal import AutoDistributedModelForCausalLM, InferenceSession
from shoal.bundled import STORIES
from shoal.host.processes import interruptible
from shoal.testing import Link, shaped_swarm

TRIP_SECONDS = 0.05
PASS = re.compile(r"^(\S+ \S+) DEBUG \S+: \d+ requests, (\d+) tokens: (\S+) s$", re.MULTILINE)
"""What a server logs at the end of a pass."""
CLIENT, SERVER, TRAVEL = "#4c72b0", "#dd8452", "#9a9a9a"


@dataclass(frozen=True)
class Work:
    """Something that was computed, from `begin` to `end` in Unix seconds."""

    begin: float
    end: float
    num_tokens: int

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True)
class Round:
    """A step: what the client did since the last answer, the passes of the servers, and when the answer was there."""

    client: Work
    passes: tuple[Work, ...]
    answered: float

    @property
    def seconds(self) -> float:
        return self.answered - self.client.begin

    @property
    def trips(self) -> float:
        """The seconds in which nothing of it was computed."""
        return self.seconds - self.client.seconds - sum(each.seconds for each in self.passes)


@contextmanager
def recorded(steps: list[Work]) -> Iterator[None]:
    """A context in which the steps of sessions are recorded: from sending to the answer."""
    original = InferenceSession.step_on_loop

    async def step_on_loop(self: Any, hidden_BTD: torch.Tensor, **options: Any) -> Any:
        begin = time.time()
        answer = await original(self, hidden_BTD, **options)
        steps.append(Work(begin, time.time(), hidden_BTD.shape[1]))
        return answer

    InferenceSession.step_on_loop = step_on_loop  # type: ignore[method-assign]
    try:
        yield
    finally:
        InferenceSession.step_on_loop = original  # type: ignore[method-assign]


def passes_in(log: str) -> list[Work]:
    """The passes of a server's log, whose times are those of their ends, to the millisecond."""
    found = []
    for stamp, num_tokens, seconds in PASS.findall(log):
        end = datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S,%f").timestamp()
        found.append(Work(end - float(seconds), end, int(num_tokens)))
    return found


def rounds_of(steps: Sequence[Work], passes: Sequence[Sequence[Work]]) -> list[Round]:
    """The steps after the first, each with its pass on each server. Steps that were computed in pieces are left out."""
    found = []
    for before, step in itertools.pairwise(steps):
        own = [each for server in passes for each in server if step.begin < each.end <= step.end + 0.001]
        if len(own) == len(passes) and all(each.num_tokens == step.num_tokens for each in own):
            found.append(Round(Work(before.end, step.begin, step.num_tokens), tuple(own), step.end))
    return found


def measure(model_path: Path, num_tokens: int, acceptance: float) -> dict[str, list[Round]]:
    """The rounds of a plain text, and of the same with guesses."""
    num_blocks = transformers.AutoConfig.from_pretrained(model_path).num_hidden_layers
    bounds = [num_blocks * stage // NUM_STAGES for stage in range(NUM_STAGES + 1)]
    spans = [f"{start}:{end}" for start, end in itertools.pairwise(bounds)]
    link = Link(delay_seconds=TRIP_SECONDS, bytes_per_second=100e6 / 8)
    with shaped_swarm(model_path, spans, link=link, options=["--dtype", "float32", "-v"]) as swarm:
        model = AutoDistributedModelForCausalLM.from_pretrained(
            model_path, initial_peers=swarm.addresses, dtype=torch.float32, audits="off"
        )
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(model_path)
            prompt = tokenizer(START, return_tensors="pt").input_ids
            plain, guessing = list[Work](), list[Work]()
            with recorded(plain):
                told = tell(model, prompt, num_tokens, "off")
            known = KnownText([*prompt[0].tolist(), *told.tokens], acceptance, says=acceptance, seed=0)
            with recorded(guessing):
                tell(model, prompt, num_tokens, known)
            passes = [passes_in(server.log) for server in swarm.servers]
        finally:
            model.close()
    return {
        "a plain step": rounds_of(plain, passes),
        "a step with guesses": [each for each in rounds_of(guessing, passes) if each.client.num_tokens > 1],
    }


def median_of(rounds: Sequence[Round]) -> Round:
    """The round of median length."""
    return sorted(rounds, key=lambda each: each.seconds)[len(rounds) // 2]


def draw(drawn: dict[str, Round], out: Path) -> None:
    """A picture of both rounds, one above the other, on the same scale of time."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "shoal"
    import matplotlib.pyplot as plt

    longest = max(each.seconds for each in drawn.values())
    names = ["client", *(f"server {chr(65 + index)}" for index in range(NUM_STAGES)), "client"]
    figure, axes = plt.subplots(len(drawn), 1, figsize=(8, 5), sharex=True, layout="constrained")
    for axis, (title, one) in zip(axes, drawn.items(), strict=True):
        start = one.client.begin
        bars = [one.client, *one.passes, Work(one.answered, one.answered, 0)]
        for row, bar in enumerate(bars):
            color = CLIENT if row in (0, len(bars) - 1) else SERVER
            left, width = 1e3 * (bar.begin - start), 1e3 * max(bar.seconds, 0.001)
            axis.barh(row, width, left=left, height=0.6, color=color)
            label = f"{1e3 * bar.seconds:.1f} ms" if bar.seconds else f"{1e3 * one.seconds:.0f} ms"
            axis.annotate(
                label, (left + width, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
            )
        for row, (sender, receiver) in enumerate(itertools.pairwise(bars)):
            ends = [1e3 * (sender.end - start), 1e3 * (receiver.begin - start)]
            axis.annotate(
                "",
                (ends[1], row + 0.7),
                (ends[0], row + 0.3),
                arrowprops={"arrowstyle": "->", "color": TRAVEL, "shrinkA": 0, "shrinkB": 0},
            )
        axis.set_yticks(range(len(bars)), names)
        axis.invert_yaxis()
        axis.set_xlim(0, 1e3 * longest * 1.12)
        axis.set_title(
            f"{title}: {one.client.num_tokens} token{'s' * (one.client.num_tokens > 1)}", loc="left", fontsize=10
        )
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("milliseconds")
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=STORIES)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--acceptance", type=float, default=0.85)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    rounds = measure(arguments.model, arguments.tokens, arguments.acceptance)
    if not all(rounds.values()):
        sys.exit("no step could be matched with a pass of each server")
    drawn = {name: median_of(of_kind) for name, of_kind in rounds.items()}
    print(f"{describe_machine()}; medians of {', '.join(f'{len(each)} steps' for each in rounds.values())}\n")
    print(
        "| step | tokens | all, ms | client, ms | passes of four servers, ms | trips, ms | of which 250 ms of light |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, of_kind in rounds.items():
        whole, client, passes, trips, tokens = (
            statistics.median(values)
            for values in zip(
                *(
                    (
                        each.seconds,
                        each.client.seconds,
                        sum(work.seconds for work in each.passes),
                        each.trips,
                        each.client.num_tokens,
                    )
                    for each in of_kind
                ),
                strict=True,
            )
        )
        light = (NUM_STAGES + 1) * TRIP_SECONDS / trips
        cells = (f"{1e3 * seconds:.1f}" for seconds in (whole, client, passes, trips))
        print(f"| {name} | {tokens:g} | {' | '.join(cells)} | {light:.0%} |")
    if arguments.out:
        draw(drawn, arguments.out)


if __name__ == "__main__":
    main()
