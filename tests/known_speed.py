"""A speed that servers find in their cache, so that they need not measure it."""

from __future__ import annotations

from pathlib import Path

import torch

from shoal.model.weights.checkpoint import Checkpoint
from shoal.server.measured_speed import Measurement, PassRuns, Runs, cached_profile, machine_key


def know_speed(model: Path, *, num_blocks: int, decode_speed: float) -> None:
    """Store how fast this machine decodes through `num_blocks` of a model, in tokens per second and in float32.

    It is of use for half as many to twice as many blocks. A server would measure for seconds, three times while other
    processes want the cores, and one server after another.
    """
    weights = f"{Checkpoint.open(str(model)).fingerprint}, quantization none,"
    key = machine_key(weights=weights, dtype=torch.float32, device=torch.device("cpu"))
    cached_profile(key, lambda: quiet(num_blocks, 1 / decode_speed), num_blocks=num_blocks)


def quiet(num_blocks: int, decode_seconds: float) -> Measurement:
    """What a quiet machine would have measured."""

    def runs(seconds: float) -> PassRuns:
        return PassRuns(num_blocks, Runs((seconds,), 1.0), Runs((seconds / num_blocks,), 1.0))

    batches = ((1, runs(decode_seconds)), (8, runs(4 * decode_seconds)), (32, runs(16 * decode_seconds)))
    return Measurement(runs(decode_seconds), runs(12 * decode_seconds), 128, batches)
