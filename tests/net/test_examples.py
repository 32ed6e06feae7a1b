"""The examples as users run them, against a swarm of two processes. Each has to learn its task."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from shoal.bundled import STORIES
from shoal.host.processes import Children
from shoal.testing.preloaded import PreloadedProcess

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SECONDS = 300.0
"""The limit for one example."""
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Run:
    """The output of an example, and the folder with its files."""

    out: str
    folder: Path

    def figures(self, name: str) -> list[float]:
        """The numbers that follow `name:` in the output."""
        return [float(figure) for figure in re.findall(rf"\b{name}: ([0-9.]+)", self.out)]

    def has_plot(self, file: str) -> bool:
        """Whether the file is a PNG with a plot in it: colored pixels on white."""
        path = self.folder / file
        if not path.read_bytes().startswith(PNG):
            return False
        pixels = imread(path)[..., :3]
        return bool(pixels.shape[0] >= 300 and np.ptp(pixels, axis=-1).max() > 0.3)


@pytest.fixture(scope="module")
def peers() -> Iterator[str]:
    """The address of a swarm that serves the bundled model in two halves."""
    with Children() as children:
        options = ("--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32", "--cache-tokens", "4096")
        first = children.start(
            "first", "serve", str(STORIES), "--new-swarm", "--blocks", "0:6", *options, launch=PreloadedProcess
        )
        for _ in children.wait_for([first], seconds=SECONDS):
            pass
        address = first.facts["address"]
        joining = ("--initial-peers", address, "--blocks", "6:12")
        second = children.start("second", "serve", str(STORIES), *joining, *options, launch=PreloadedProcess)
        for _ in children.wait_for([second], seconds=SECONDS):
            pass
        yield address


@pytest.fixture
def example(peers: str, tmp_path: Path) -> Callable[..., Run]:
    """Run an example to its end. It has to succeed."""

    def run(name: str, *arguments: str) -> Run:
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / f"{name}.py"), "--folder", str(tmp_path), *arguments],
            env=dict(os.environ, SHOAL_INITIAL_PEERS=peers, OMP_NUM_THREADS="1"),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, done.stderr
        return Run(done.stdout, tmp_path)

    return run


def test_a_soft_prompt_learns_how_a_day_ended(example):
    run = example("sentiment", "--steps", "25", "--lr", "0.02")
    (before,), (after,) = run.figures("accuracy before"), run.figures("accuracy after")
    assert before < 0.65  # chance is 0.5
    assert after > before + 0.25
    assert run.has_plot("sentiment.png")


def test_lora_learns_to_follow_instructions(example):
    run = example("instructions", "--steps", "20")
    (before,), (after,) = run.figures("accuracy before"), run.figures("accuracy after")
    assert before < 0.1
    assert after > before + 0.5
    assert run.has_plot("instructions.png")
    assert (run.folder / "adapter" / "adapter_model.safetensors").is_file()


def test_two_participants_learn_tasks_for_which_only_one_has_data(example):
    run = example("together", "--steps", "8")
    before, after = run.figures("accuracy before"), run.figures("after")
    assert len(before) == len(after) == 2
    assert after[0] == after[1]  # both have the same adapter
    assert after[0] > max(before) + 0.6  # each has data for half of the questions
    assert run.has_plot("together.png")


def test_participants_learn_without_a_coordinator_and_with_differential_privacy(example):
    little = (
        "--noise",
        "0.2",
        "--batch-size",
        "12",
        "--noise-seed",
        "1",
    )  # with more noise, 16 steps learn nothing
    run = example("together", "--steps", "16", "--decentralized", "--private", *little)
    assert min(run.figures("after")) > max(run.figures("accuracy before")) + 0.25
    (epsilon,) = run.figures("epsilon")
    assert 0 < epsilon < 100
    assert all(run.has_plot(f"participant-{number}.png") for number in range(2))
    assert not (run.folder / "together.png").exists()  # exact losses stay with their participant
