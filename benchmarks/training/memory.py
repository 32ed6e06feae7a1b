"""The memory of a client that trains, compared with its own weights and with the whole model.

Each is measured in a process of its own, after a step with a few tokens, because the memory during a step depends on
the batch. Mapped pages of files count. The memory of Python and its libraries is subtracted.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import torch

from benchmarks.common.swarm import servers
from benchmarks.common.tuning import Table, Tuner, client, local_model, tokens_of
from benchmarks.training.speed import DTYPE, Scale

ADAMW_COPIES = 4
"""A parameter, its gradient and its two moments."""
LIMIT = 1.1


def used() -> dict[str, int]:
    memory = psutil.Process().memory_info()
    return {"resident": memory.rss}


def tune(folder: Path, address: str | None) -> dict[str, int]:
    """Resident bytes after a training step, and the bytes that a client cannot do without."""
    model = local_model(folder, DTYPE) if address is None else client(folder, address, DTYPE)
    tuner = Tuner(model)
    tuner.loss(tokens_of(model, 1, seed=0, num_tokens=8)).backward()
    tuner.optimizer.step()
    ends = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    trained = ADAMW_COPIES * sum(each.nbytes for each in tuner.parameters.values())
    found = {**used(), "ends": sum(each.nbytes for each in ends), "trained": trained}
    if address is not None:
        model.close()
    return found


def measure(*task: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training.memory", *task], check=True, stdout=subprocess.PIPE
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def memory(scale: Scale) -> Table:
    nothing = measure("nothing")["resident"]
    local = measure("tune", str(scale.folder))
    with servers(scale.folder, [scale.all], "--cache-tokens", "1024") as address:
        swarm = measure("tune", str(scale.folder), address)
    needed = swarm["ends"] + swarm["trained"]
    client_bytes, local_bytes = swarm["resident"] - nothing, local["resident"] - nothing
    return Table(
        "Resident memory of a process that trains, MB, without Python and its libraries",
        ("what", "MB", "ratio to the minimum", "ratio to the whole model", "goal"),
        (
            ("embeddings and output head", swarm["ends"] / 1e6, None, None, None, None),
            ("factors, gradients, moments", swarm["trained"] / 1e6, None, None, None, None),
            (
                "the client",
                client_bytes / 1e6,
                client_bytes / needed,
                client_bytes / local_bytes,
                f"≤ {LIMIT:g}",
                client_bytes <= LIMIT * needed,
            ),
            ("the whole model, with PEFT", local_bytes / 1e6, None, 1.0, None, None),
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
