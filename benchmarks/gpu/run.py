"""Shoal on one GPU, compared with Transformers on the same one: a run of under eight minutes, without a network.

    python -m benchmarks.gpu.run [--device cuda] [--tiny] [--only ROW ...] [--seconds 460] [--no-tests] [--output FILE]

`scripts/gpu` calls it. First tests/gpu run. Then two servers are started, which share the device and hold half of the
blocks each, of a model of Llama-3.1-8B's shapes with random weights; each row of the table is measured by a process of
its own beside them (`benchmarks.gpu.rows`). A row that fails, or takes longer than it may, is reported as such, and the
others are measured all the same. `--device cpu --tiny` tries all of it on a processor; these figures say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.machine import describe_machine
from benchmarks.common.reference import llama_8b_config, made_model, tiny_config
from benchmarks.common.swarm import servers
from benchmarks.gpu.rows import ROWS, Setting, describe_device, measure
from shoal.host.processes import interruptible

TOTAL_SECONDS = 460.0
"""What the whole run may take, with the end of the servers: a little under eight minutes."""
TEST_SECONDS = 120.0
TINY_ROW_SECONDS = 240.0
"""A row of a trial, on a processor that is slow or busy."""
CACHE_TOKENS, TINY_CACHE_TOKENS = 65536, 4096
"""Room for 128 sessions and for the long prompt, beside the local model and a training step."""


@dataclass(frozen=True)
class Outcome:
    """A row of the table: its figures, or why there are none."""

    name: str
    seconds: float
    figures: tuple[dict[str, Any], ...] = ()
    failure: str = ""


class Clock:
    """The time that is left of a run."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_tests(seconds: float) -> str:
    """The last line of the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rf", "tests/gpu"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} s"
    log(done.stdout[-4000:] + done.stderr[-2000:])
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith("FAILED")]
    return "; ".join([lines[-1] if lines else f"status {done.returncode}", *failed])


def same_bits(device: str, seconds: float) -> str:
    """What `benchmarks.determinism` prints for this device: which passes give a session the same bits."""
    command = [sys.executable, "-m", "benchmarks.determinism", "--device", device]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} s"
    return done.stdout.strip() if done.returncode == 0 else f"failed with status {done.returncode}"


def measured(name: str, setting: Setting, seconds: float) -> Outcome:
    """Measure one row in a process of its own, which is killed after `seconds`."""
    began = time.monotonic()
    if seconds < 5:
        return Outcome(name, 0.0, failure="no time was left")
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--row", name, "--setting", setting.as_json()]
    try:
        row = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return Outcome(name, time.monotonic() - began, failure=f"not done after {seconds:.0f} s")
    taken = time.monotonic() - began
    try:
        said = json.loads(row.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return Outcome(name, taken, failure=f"it ended with status {row.returncode}")
    return Outcome(name, taken, tuple(said.get("figures", ())), said.get("failure", ""))


def all_rows(arguments: argparse.Namespace, clock: Clock) -> Iterator[Outcome]:
    """Make the model, start the servers, and measure the rows that are wanted, one after another."""
    began = time.monotonic()
    config = tiny_config() if arguments.tiny else llama_8b_config()
    folder = made_model(config, _folder(arguments.tiny), device=arguments.device)
    blocks = config.num_hidden_layers
    log(f"the model was there after {time.monotonic() - began:.0f} s")
    began = time.monotonic()
    options = (
        "--cache-tokens",
        str(TINY_CACHE_TOKENS if arguments.tiny else CACHE_TOKENS),
        "--training-memory",
        "16384",
    )
    halves = (f"0:{blocks // 2}", f"{blocks // 2}:{blocks}")
    with servers(folder, halves, *options, of_last=("--serve-head",), device=arguments.device) as address:
        log(f"the servers were ready after {time.monotonic() - began:.0f} s")
        setting = Setting(str(folder), address, arguments.device, arguments.tiny)
        for name in arguments.only:
            most = TINY_ROW_SECONDS if arguments.tiny else ROWS[name].seconds
            outcome = measured(name, setting, min(most, clock.left - 5))
            log(f"{name}: {outcome.failure or 'done'}, {outcome.seconds:.0f} s")
            yield outcome


def _folder(tiny: bool) -> Path:
    return Path(tempfile.gettempdir()) / f"shoal-gpu-model{'-tiny' if tiny else ''}"


def report(
    tests: str, outcomes: Sequence[Outcome], bits: str, failure: str, arguments: argparse.Namespace, seconds: float
) -> str:
    """The results as markdown."""
    lines = [
        f"# Shoal on {describe_device(arguments.device)}, {date.today()}",
        "",
        f"{describe_machine()}. `scripts/gpu`, {seconds:.0f} s in all.",
        "",
        *(["**A trial with a tiny model: these figures say nothing.**", ""] if arguments.tiny else []),
        f"tests/gpu: {tests}",
        "",
        *([f"**The run broke off: {failure}**", ""] if failure else []),
        "| what | shoal | against | unit | ratio | goal | |",
        "|---|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        for each in outcome.figures:
            ratio = "" if each["ratio"] is None else f"**{each['ratio']:.2f}**"
            other = "" if each["other"] is None else f"{each['other']:.4g}"
            verdict = "met" if each["met"] else "missed"
            lines.append(
                f"| {each['name']} | {each['shoal']:.4g} | {other} | {each['unit']} | {ratio} | {each['goal']} "
                f"| {verdict} |"
            )
        if outcome.failure:
            lines.append(f"| {outcome.name} | | | | | {ROWS[outcome.name].goal} | failed: {outcome.failure} |")
    return "\n".join([*lines, "", "## A session alone, and beside others", "", bits, ""])


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the run itself")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS)
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--output", type=Path, help="where the results are written too; they are always printed")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--setting", type=Setting.from_json, help=argparse.SUPPRESS)
    return parser.parse_args()


@interruptible()
def main() -> None:
    arguments = parsed()
    if arguments.row is not None:
        print(json.dumps(measure(arguments.row, arguments.setting)))
        return
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no GPU of CUDA here; --device cpu --tiny tries the run without one")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # of all processes that are started
    began, clock = time.monotonic(), Clock(arguments.seconds)
    tests = "not run" if arguments.no_tests else run_tests(min(TEST_SECONDS, clock.left))
    outcomes: list[Outcome] = []
    failure, bits = "", "not run"
    try:
        for outcome in all_rows(arguments, clock):
            outcomes.append(outcome)
        if clock.left > 10:
            bits = same_bits(arguments.device, min(TEST_SECONDS, clock.left - 5))
    except (Exception, SystemExit) as error:  # what was measured before is reported all the same
        failure = f"{type(error).__name__}: {error}"
    text = report(tests, outcomes, bits, failure, arguments, time.monotonic() - began)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text)
    if failure or any(outcome.failure for outcome in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
