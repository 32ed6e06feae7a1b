"""Fine-tuning through a swarm, compared with plain Transformers and PEFT on one machine, in one run.

    python -m benchmarks.training [--only exactness speed ...] [--rounds 2] [--blocks 16] [--json]

exactness   errors of the gradients of LoRA factors, soft prompts and inputs, in several dtypes (bundled model)
speed       LoRA of rank 8 on all linear layers, 8x128 tokens: two servers with half of the blocks each, on loopback,
            compared with one process; for training steps and for forward passes alone
servers     two servers with all blocks, each on its own core, compared with one of them
network     64x128 tokens at 100 Mbit/s with a round trip of 100 ms, compared with the same servers unshaped
memory      memory of the client's process
kills       50 steps with a SIGKILL every 10 steps; the adapter has to equal that of an undisturbed run (bundled model)

Speeds are measured with the reference model in bf16. Both sides of a comparison take turns, so that other load on the
machine affects both. Ratios compare figures of the same round; the table has their medians. The exit status is 1 if
gradients or the adapter are less exact than their limits. `--blocks 4` only checks that the script runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import date

import transformers

from benchmarks.common.machine import describe_machine
from benchmarks.common.reference import NUM_BLOCKS, reference_model
from benchmarks.common.tuning import Table
from benchmarks.training.exactness import exactness
from benchmarks.training.kills import kills
from benchmarks.training.memory import memory
from benchmarks.training.speed import Scale, compare_with_local, compare_with_one_server, compare_with_unshaped
from shoal.host.processes import interruptible

PARTS: dict[str, Callable[[Scale], Table | None]] = {
    "exactness": lambda scale: exactness(),
    "speed": compare_with_local,
    "servers": compare_with_one_server,
    "network": compare_with_unshaped,
    "memory": memory,
    "kills": lambda scale: kills(),
}
EXACT = ("exactness", "kills")


@interruptible()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=NUM_BLOCKS, help="number of blocks of the reference model")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    load_before = os.getloadavg()[0]
    scale = Scale(reference_model(num_blocks=arguments.blocks), arguments.blocks, arguments.rounds)
    if not arguments.json:
        print(f"{describe_machine()}; load before {load_before:.1f}\n")
    found: dict[str, Table] = {}
    for name in arguments.only:
        if (table := PARTS[name](scale)) is not None:
            found[name] = table
            if not arguments.json:  # immediately, because the next part may take half an hour
                table.print()
    if arguments.json:
        about = {"machine": describe_machine(), "date": str(date.today()), "load_before": load_before}
        tables = {name: asdict(table) for name, table in found.items()}
        print(json.dumps({**about, "rounds": scale.rounds, "blocks": scale.num_blocks, "parts": tables}, indent=2))
    return 0 if all(found[name].is_met for name in EXACT if name in found) else 1


if __name__ == "__main__":
    sys.exit(main())
