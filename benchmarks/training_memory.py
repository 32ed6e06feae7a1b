"""How much memory a client needs that trains, against what it has to hold and against the whole model.

Each is measured in a process of its own, after a step with a few tokens: what a batch needs meanwhile depends on the
batch. Pages of files that are mapped count; those of Python and its libraries are taken off.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import torch

from benchmarks.swarm import servers
from benchmarks.training_speed import DTYPE, Scale
from benchmarks.tuning import Table, Tuner, client, tokens_of, whole

OF_ADAMW = 4
"""A parameter, its gradient and its two moments."""
LIMIT = 1.1


def used() -> dict[str, int]:
    memory = psutil.Process().memory_info()
    return {"resident": memory.rss}


def tune(folder: Path, address: str | None) -> dict[str, int]:
    """What is resident with a model of which a step was trained, and what of it the client has to hold."""
    model = whole(folder, DTYPE) if address is None else client(folder, address, DTYPE)
    tuner = Tuner(model)
    tuner.loss(tokens_of(model, 1, seed=0, num_tokens=8)).backward()
    tuner.optimizer.step()
    ends = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    trained = OF_ADAMW * sum(each.nbytes for each in tuner.parameters.values())
    found = {**used(), "ends": sum(each.nbytes for each in ends), "trained": trained}
    if address is not None:
        model.close()
    return found


def measure(*task: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training_memory", *task], check=True, stdout=subprocess.PIPE
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def memory(scale: Scale) -> Table:
    nothing = measure("nothing")["resident"]
    local = measure("tune", str(scale.folder))
    with servers(scale.folder, [scale.all], "--cache-tokens", "1024") as address:
        swarm = measure("tune", str(scale.folder), address)
    needed = swarm["ends"] + swarm["trained"]
    taken, of_local = swarm["resident"] - nothing, local["resident"] - nothing
    return Table(
        "Resident memory of a process that trains, MB, without Python and its libraries",
        ("what", "MB", "of what it has to hold", "of the whole model", "goal"),
        (
            ("embeddings and output head", swarm["ends"] / 1e6, None, None, None, None),
            ("factors, gradients, moments", swarm["trained"] / 1e6, None, None, None, None),
            ("the client", taken / 1e6, taken / needed, taken / of_local, f"≤ {LIMIT:g}", taken <= LIMIT * needed),
            ("the whole model, with PEFT", of_local / 1e6, None, 1.0, None, None),
            ("(Python and its libraries)", nothing / 1e6, None, None, None, None),
        ),
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    match sys.argv[1:]:
        case ["nothing"]:
            print(json.dumps(used()))
        case ["tune", folder]:
            print(json.dumps(tune(Path(folder), None)))
        case ["tune", folder, address]:
            print(json.dumps(tune(Path(folder), address)))
