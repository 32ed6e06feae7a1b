"""The memory of a server of 2 of the reference model's 16 blocks, compared with the whole model.

    python -m benchmarks.memory

Each process loads one of them and computes one pass. Python and PyTorch count in both. `peak` is the maximum of the
process's resident memory. `private` is the memory at the end that is not shared with the system's file cache.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.common.reference import reference_config, reference_model
from shoal.host.processes import interruptible

NUM_TOKENS = 128
LIMIT = 1 / 3


def load_whole(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.inference_mode():
        model(torch.arange(NUM_TOKENS)[None])


def load_blocks(folder: Path, blocks: str) -> None:
    import torch

    from shoal.model.body import build_body
    from shoal.model.weights.checkpoint import Checkpoint
    from shoal.spans import Span

    checkpoint, span = Checkpoint.open(folder), Span.parse(blocks)
    body = build_body(checkpoint.family, checkpoint.config, span, checkpoint.block_tensors(span), dtype=torch.bfloat16)
    hidden_BTD = torch.zeros(1, NUM_TOKENS, reference_config().hidden_size, dtype=torch.bfloat16)
    with torch.inference_mode():
        body(hidden_BTD)


def import_only() -> None:
    import shoal.model.body
    import shoal.model.weights.checkpoint  # noqa: F401


def measure(*task: str) -> dict[str, int]:
    """Peak and private memory, in MB, of a new process that does this task."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.memory", *task], check=True, stdout=subprocess.PIPE)
    return dict(json.loads(done.stdout))


def report() -> None:
    # The peak of `resource.getrusage` would include that of the parent process.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak, private = (int(status[field].split()[0]) * 1024 // 10**6 for field in ("VmHWM", "RssAnon"))
    print(json.dumps({"peak": peak, "private": private}))


@interruptible()
def main() -> int:
    folder = str(reference_model())
    rows = {
        "Python, torch and shoal alone": measure("nothing"),
        "the whole model, Transformers": measure("whole", folder),
        "blocks 0:2 of 16, shoal": measure("blocks", folder, "0:2"),
        "blocks 7:9 of 16, shoal": measure("blocks", folder, "7:9"),
    }
    print(f"{'MB':32}{'peak':>8}{'private':>10}")
    for name, row in rows.items():
        print(f"{name:32}{row['peak']:8}{row['private']:10}")
    whole, *blocks = [row["peak"] for row in list(rows.values())[1:]]
    ratio = max(blocks) / whole
    print(f"the peak of 2 of 16 blocks is {ratio:.2f} of that of the whole model (limit {LIMIT:.2f})")
    return 0 if ratio < LIMIT else 1


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            sys.exit(main())
        case ["-h" | "--help"]:
            print(__doc__)
            sys.exit()
        case ["nothing"]:
            import_only()
        case ["whole", folder]:
            load_whole(Path(folder))
        case ["blocks", folder, blocks]:
            load_blocks(Path(folder), blocks)
    report()
