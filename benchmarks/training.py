"""Fine-tuning over a swarm, against plain Transformers and PEFT on one machine, in one run.

    python -m benchmarks.training [--only exactness speed ...] [--rounds 2] [--blocks 16] [--json]

exactness   gradients of LoRA factors, soft prompts and inputs, in several precisions (the bundled model)
speed       LoRA of rank 8 on all linear layers, 8x128 tokens: two servers of half of the blocks on loopback, as users
            run them, against one process; training steps, and forward passes alone
servers     two servers of all blocks instead of one, each with a core of its own
network     64x128 tokens over 100 Mbit/s with a round trip of 100 ms, against the same servers unshaped
memory      of the client's process
kills       50 steps, a SIGKILL every 10: is it the adapter of the undisturbed run? (the bundled model, float32)

The speeds are those of the reference model in bf16. Whatever is compared takes turns, so that the machine's other work
hits both; ratios are of the same round, and medians over the rounds. Ends with status 1 if gradients or an adapter are
not as exact as they have to be. `--blocks 4` tries the script; its figures say little.
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

from benchmarks.machine import describe_machine
from benchmarks.reference import NUM_BLOCKS, reference_model
from benchmarks.training_exactness import exactness
from benchmarks.training_kills import kills
from benchmarks.training_memory import memory
from benchmarks.training_speed import Scale, of_local, of_one_server, of_unshaped
from benchmarks.tuning import Table

PARTS: dict[str, Callable[[Scale], Table | None]] = {
    "exactness": lambda scale: exactness(),
    "speed": of_local,
    "servers": of_one_server,
    "network": of_unshaped,
    "memory": memory,
    "kills": lambda scale: kills(),
}
EXACT = ("exactness", "kills")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=NUM_BLOCKS, help="of the reference model")
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
            if not arguments.json:  # as soon as it is known: the next part may take half an hour
                table.print()
    if arguments.json:
        about = {"machine": describe_machine(), "date": str(date.today()), "load_before": load_before}
        tables = {name: asdict(table) for name, table in found.items()}
        print(json.dumps({**about, "rounds": scale.rounds, "blocks": scale.num_blocks, "parts": tables}, indent=2))
    return 0 if all(found[name].is_met for name in EXACT if name in found) else 1


if __name__ == "__main__":
    sys.exit(main())
