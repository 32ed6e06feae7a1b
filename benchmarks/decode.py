"""Decoding through a swarm on this machine, against Transformers' own `generate` on the whole model, in one run.

    python benchmarks/decode.py [--tokens 64] [--rounds 5] [--servers 2] [--json]

The reference model in bf16, one client, servers as processes of their own on loopback. Local and swarm take turns, so
that whatever else the machine does hits both. The tokens must be the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe_machine
from reference import reference_model
from swarm import servers

from shoal import AutoDistributedModelForCausalLM

PROMPT_TOKENS = 64


def tokens_per_second(model: Any, prompt: torch.Tensor, num_tokens: int) -> tuple[float, list[int]]:
    """Decoding alone: what `num_tokens` more tokens cost beyond the first one."""
    seconds = []
    for new in (1, num_tokens + 1):
        start = time.perf_counter()
        output = model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        seconds.append(time.perf_counter() - start)
    return num_tokens / (seconds[1] - seconds[0]), output[0].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()

    folder = reference_model()
    bounds = [16 * index // arguments.servers for index in range(arguments.servers + 1)]
    spans = [f"{start}:{end}" for start, end in itertools.pairwise(bounds)]
    prompt = torch.randint(2, 32000, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    local = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    rounds: list[tuple[float, float]] = []
    with servers(folder, spans) as address:
        model = AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=[address], dtype=torch.bfloat16)
        for index in range(arguments.rounds + 1):
            of_local, expected = tokens_per_second(local, prompt, arguments.tokens)
            of_swarm, found = tokens_per_second(model, prompt, arguments.tokens)
            if found != expected:
                raise SystemExit("the swarm's tokens are not those of the whole model")
            if index:  # the first round warms up
                rounds.append((of_local, of_swarm))
                print(f"round {index}: {of_local:6.2f} {of_swarm:6.2f} {of_swarm / of_local:6.3f}", file=sys.stderr)
        model.close()

    result = {
        "machine": describe_machine(),
        "load_before": os.getloadavg()[2],
        "servers": arguments.servers,
        "tokens": arguments.tokens,
        "local_tokens_per_second": statistics.median(each for each, _ in rounds),
        "swarm_tokens_per_second": statistics.median(each for _, each in rounds),
        "ratio": statistics.median(swarm / local for local, swarm in rounds),
    }
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['machine']}\n")
    print("decoding, one client, bf16              tokens/s   of local")
    print(f"Transformers, the whole model           {result['local_tokens_per_second']:8.2f}       1.00")
    print(
        f"shoal, {arguments.servers} servers on loopback             "
        f"{result['swarm_tokens_per_second']:8.2f}       {result['ratio']:.2f}"
    )


if __name__ == "__main__":
    main()
