"""The process of an attacker: `python -m benchmarks.abuse.attacker MODULE NAME ADDRESS ...`.

It prints `begun` when the attack is in full swing, and ends when stdin ends.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import sys

import torch

from benchmarks.abuse.attacked_swarm import AttackedSwarm
from benchmarks.abuse.attacks import Attack
from shoal.cli.service.long_running import end_with_parent

NICENESS = 10
"""Where cores are few, the attacker's own work must not look like an effect of the attack."""


def attacks_of(module: str) -> tuple[Attack, ...]:
    """The attacks of a module of this package."""
    attacks: tuple[Attack, ...] = importlib.import_module(f"benchmarks.abuse.{module}").ATTACKS
    return attacks


async def attack(module: str, name: str, addresses: tuple[str, ...]) -> None:
    (chosen,) = (each for each in attacks_of(module) if each.name == name)
    async with AttackedSwarm(addresses) as swarm:
        await chosen.run(swarm)


def main() -> None:
    module, name, *addresses = sys.argv[1:]
    end_with_parent()
    os.nice(NICENESS)
    torch.set_num_threads(1)
    asyncio.run(attack(module, name, tuple(addresses)))


if __name__ == "__main__":
    main()
