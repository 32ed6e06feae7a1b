"""What the swarms of processes share: a cache that knows how fast this machine computes the bundled model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shoal.bundled import STORIES
from shoal.model.weights.checkpoint import Checkpoint
from shoal.server.throughput import Measurement, PassRuns, Runs, cached_profile, machine_key

NUM_BLOCKS = 6
"""Half of the bundled model; what is known of it is of use for spans of 3 to 12 blocks."""
DECODE_SPEED = 250.0
"""Tokens per second through these blocks."""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache for the processes that a module starts. With it, a server that computes in float32 measures nothing.

    It would do so for seconds, up to three times while other processes want the cores, and one server after another.
    """
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_CACHE", str(folder))
        weights = f"{Checkpoint.open(str(STORIES)).fingerprint}, quantization none,"
        key = machine_key(weights=weights, dtype=torch.float32, device=torch.device("cpu"))
        cached_profile(key, lambda: quiet(1 / DECODE_SPEED, prefill_seconds=0.05), num_blocks=NUM_BLOCKS)
        yield folder


def quiet(decode_seconds: float, *, prefill_seconds: float) -> Measurement:
    """What a quiet machine would have measured."""

    def runs(seconds: float) -> PassRuns:
        return PassRuns(NUM_BLOCKS, Runs((seconds,), 1.0), Runs((seconds / NUM_BLOCKS,), 1.0))

    batches = ((1, runs(decode_seconds)), (8, runs(4 * decode_seconds)), (32, runs(16 * decode_seconds)))
    return Measurement(runs(decode_seconds), runs(prefill_seconds), 128, batches)
