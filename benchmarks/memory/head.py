"""What a client saves if a server computes the output head: memory, and its own computing time.

    python -m benchmarks.memory.head [--tokens 48] [--rounds 3] [--json]

One server on loopback holds all blocks and the head of the reference model in bf16. Each client is a process with one
thread, and the clients take turns. `mapped` is the resident memory of files (weights and libraries), `private` is the
other resident memory, and `computing` is the client's own CPU time for a token.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common.machine import describe_machine
from benchmarks.common.reference import reference_model
from benchmarks.common.swarm import servers
from shoal.host.processes import interruptible

PROMPT_TOKENS = 64
CLIENTS: dict[str, dict[str, Any]] = {
    "head on the client": {},
    "head on the client, int8": {"head_quantization": "int8"},
    "head on the client, nf4": {"head_quantization": "nf4"},
    "head on the server": {"remote_head": True},
    "head on the server, top 40 tokens": {"remote_head": True, "head_top_k": 40},
}


def client(folder: str, address: str, options: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    import torch
    import transformers

    from shoal import AutoDistributedModelForCausalLM

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    model = AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=[address], **options)
    prompt = torch.randint(2, 32000, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    walls, computing = [], []
    for new in (1, 1, num_tokens + 1):  # the first one warms up
        start, began = time.perf_counter(), time.process_time()
        tokens = model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        walls.append(time.perf_counter() - start)
        computing.append(time.process_time() - began)
    model.close()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    mapped, private = (int(status[field].split()[0]) * 1024 / 1e6 for field in ("RssFile", "RssAnon"))
    return {
        "mapped_mb": mapped,
        "private_mb": private,
        "tokens_per_second": num_tokens / (walls[2] - walls[1]),
        "computing_ms": 1000 * (computing[2] - computing[1]) / num_tokens,
        "tokens": tokens[0, PROMPT_TOKENS:].tolist(),
    }


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    folder = str(reference_model())
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CLIENTS}
    with servers(Path(folder), ["0:16"], "--serve-head") as address:
        for _ in range(arguments.rounds):
            for name, options in CLIENTS.items():
                task = json.dumps([folder, address, options, arguments.tokens])
                command = [sys.executable, "-m", "benchmarks.memory.head", "--client", task]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
                runs[name].append(json.loads(done.stdout))
    exact = [name for name, options in CLIENTS.items() if "head_quantization" not in options]
    if len({str(run["tokens"]) for name in exact for run in runs[name]}) != 1:
        raise SystemExit("the tokens depend on where the head is computed")
    result = {
        "machine": describe_machine(),
        "load_before": os.getloadavg()[2],
        "clients": {
            name: {key: statistics.median(run[key] for run in of_name) for key in of_name[0] if key != "tokens"}
            for name, of_name in runs.items()
        },
    }
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['machine']}\n")
    print(f"{'':32}{'mapped':>8}{'private':>9}{'tokens/s':>10}{'computing':>11}")
    for name, of_name in result["clients"].items():
        print(
            f"{name:32}{of_name['mapped_mb']:5.0f} MB{of_name['private_mb']:6.0f} MB"
            f"{of_name['tokens_per_second']:10.2f}{of_name['computing_ms']:8.1f} ms"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--client"]:
        print(json.dumps(client(*json.loads(sys.argv[2]))))
    else:
        main()
