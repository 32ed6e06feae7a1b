"""The training speed of a swarm: compared with one machine, with more servers, and over slow links."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.swarm import servers
from benchmarks.common.tuning import NUM_TOKENS, Table, Tuner, client, local_model, log, speed, speed_table, tokens_of
from shoal.testing import Link, shaped_swarm

BATCH, LARGE_BATCH, WARM_UP_BATCH = 8, 64, 4
DTYPE = torch.bfloat16
SLOW = Link(delay_seconds=0.05, bytes_per_second=100e6 / 8)
CACHE_TOKENS = ("--cache-tokens", "1024")

Act = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class Scale:
    """The model, and the number of rounds."""

    folder: Path
    num_blocks: int
    rounds: int

    @property
    def halves(self) -> tuple[str, str]:
        return f"0:{self.num_blocks // 2}", f"{self.num_blocks // 2}:{self.num_blocks}"

    @property
    def all(self) -> str:
        return f"0:{self.num_blocks}"


def in_turns(name: str, sides: Sequence[Act], batches: Sequence[torch.Tensor]) -> list[tuple[float, float]]:
    """The speeds of both sides with each batch, in tokens/s. They take turns, and the side that begins alternates."""
    found = []
    for index, tokens in enumerate(batches):
        order = (0, 1) if index % 2 == 0 else (1, 0)
        speeds = {side: speed(sides[side], tokens) for side in order}
        found.append((speeds[0], speeds[1]))
        log(f"{name}, round {index + 1}: {speeds[0]:.4g} {speeds[1]:.4g} tokens/s, {speeds[0] / speeds[1]:.3f}")
    return found


def batches_of(model: Any, scale: Scale, batch_size: int) -> list[torch.Tensor]:
    return [tokens_of(model, batch_size, seed) for seed in range(scale.rounds)]


def compare_with_local(scale: Scale) -> Table:
    """Two servers with half of the blocks each, compared with one process with all blocks."""
    local = Tuner(local_model(scale.folder, DTYPE))
    with servers(scale.folder, scale.halves, *CACHE_TOKENS) as address, _client(scale.folder, address) as model:
        swarm = Tuner(model)
        _warm_up(swarm.step, local.step, model=model)
        batches = batches_of(model, scale, BATCH)
        trained = in_turns("training", (swarm.step, local.step), batches)
        _warm_up(swarm.forward, local.forward, model=model)
        forwarded = in_turns("forward", (swarm.forward, local.forward), batches)
    return speed_table(
        f"Two servers on loopback vs. one machine, LoRA, {BATCH}x{NUM_TOKENS}",
        [("training", trained, 0.85), ("forward", forwarded, 0.95)],
    )


def compare_with_one_server(scale: Scale) -> Table | None:
    """Two servers with all blocks, each on its own core, compared with one of them."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        log("one core: two servers cannot be faster than one")
        return None
    options = ("--threads", "1", *CACHE_TOKENS)
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(servers(scale.folder, [scale.all] * 2, *options, cores=cores))
        first = address.rpartition("/")[2]
        both = stack.enter_context(_client(scale.folder, address))
        one = stack.enter_context(_client(scale.folder, address, allowed_servers=[first]))
        sides = [Tuner(each).step for each in (both, one)]
        _warm_up(*sides, model=both)
        rounds = in_turns("two servers vs. one", sides, batches_of(both, scale, BATCH))
    return speed_table(
        f"Servers with one core each, LoRA, {BATCH}x{NUM_TOKENS}",
        [("two servers with all blocks vs. one", rounds, 1.6)],
    )


def compare_with_unshaped(scale: Scale) -> Table:
    """The same servers over slow links and unshaped. Each step takes minutes, so there is one of each."""
    with contextlib.ExitStack() as stack:
        swarm = stack.enter_context(shaped_swarm(scale.folder, scale.halves, options=CACHE_TOKENS, num_threads=None))
        model = stack.enter_context(_client(scale.folder, swarm.addresses))
        tuner = Tuner(model)
        _warm_up(tuner.step, model=model)

        def over(link: Link) -> Act:
            def act(tokens: torch.Tensor) -> None:
                for server in swarm.servers:
                    server.link(link)
                tuner.step(tokens)

            return act

        batch = tokens_of(model, LARGE_BATCH, seed=0)
        rounds = in_turns("slow links vs. loopback", (over(SLOW), over(Link())), [batch])
    return speed_table(
        f"Slow links, LoRA, {LARGE_BATCH}x{NUM_TOKENS}",
        [("100 Mbit/s, round trip 100 ms, vs. loopback", rounds, 0.7)],
    )


def _warm_up(*sides: Act, model: Any) -> None:
    for act in sides:
        act(tokens_of(model, WARM_UP_BATCH, seed=0))


@contextlib.contextmanager
def _client(folder: Path, addresses: str | list[str], **options: Any) -> Any:
    model = client(folder, addresses, DTYPE, **options)
    try:
        yield model
    finally:
        model.close()
