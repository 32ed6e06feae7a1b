"""The speed of eight clients with models of many families, compared with a local batch of eight, in one run.

    python -m benchmarks.families [--only bloom qwen3_5_text ...] [--rounds 3] [--tokens 32] [--json]

Each family has a model of the shapes of a real one (`family_models.py`) in bf16. Two servers of half of its blocks are
processes on loopback, and the last one computes the output head; the clients are threads of this process. The local
batch and the swarm take turns, so that other load on the machine affects both. Ratios compare figures of the same
round; the table has their medians. `prefix` is the time to the first token of a second request with the same 1,000
tokens, divided by that of the first.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from benchmarks.common.clients import decoding_speed, generate, generate_together, local_batch_speed, median
from benchmarks.common.machine import describe_machine
from benchmarks.common.swarm import servers
from benchmarks.families.models import SHAPES, VOCABULARY, family_model
from shoal import AutoDistributedModelForCausalLM
from shoal.host.processes import interruptible

NUM_CLIENTS = 8
PROMPT_TOKENS = 64
PREFIX_TOKENS = 1000
GOALS = {"llama": 1.2, "qwen3_moe": 1.0, "deepseek_v32": 0.75, "llama4_text": 0.75}
GOAL = 0.85
PREFIX_GOAL = 0.2


@dataclass(frozen=True)
class Row:
    """What was measured with one family: tokens/s, their ratio in each round, and the ratio of first tokens."""

    family: str
    model: str
    num_weights: int
    swarm: float
    local: float
    ratios: tuple[float, ...]
    prefix: float

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return median(self.ratios)

    @property
    def goal(self) -> float:
        """The least ratio that is aimed at."""
        return GOALS.get(self.family, GOAL)


def measure(family: str, *, rounds: int, num_tokens: int) -> Row:
    """Measure one family."""
    with family_model(family) as folder:
        local: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        half = local.config.num_hidden_layers // 2
        spans = (f"0:{half}", f"{half}:{local.config.num_hidden_layers}")
        with servers(folder, spans, of_last=("--serve-head",)) as address:
            client = _client(folder, address)
            try:
                found = [_round(client, local, index, num_tokens) for index in range(rounds + 1)][1:]
                prefix = median([_prefix(client, seed) for seed in range(min(rounds, 3))])
            finally:
                client.close()
    num_weights = sum(each.numel() for each in local.parameters())
    speeds, others = zip(*found, strict=True)
    ratios = tuple(mine / other for mine, other in found)
    row = Row(family, SHAPES[family][0], num_weights, median(speeds), median(others), ratios, prefix)
    print(f"{family}: {row.swarm:.3g} of {row.local:.3g} tok/s, {_all(ratios)}; prefix {prefix:.2f}", file=sys.stderr)
    return row


def _client(folder: Path, address: str) -> Any:
    return AutoDistributedModelForCausalLM.from_pretrained(
        folder, initial_peers=[address], dtype=torch.bfloat16, remote_head=True
    )


def _round(client: Any, local: Any, index: int, num_tokens: int) -> tuple[float, float]:
    prompts = _prompts(NUM_CLIENTS, PROMPT_TOKENS, seed=index)
    other = local_batch_speed(local, prompts, num_tokens)
    return decoding_speed(generate_together(client, prompts.split(1), num_tokens + 1)), other


def _prefix(client: Any, seed: int) -> float:
    begin = _prompts(1, PREFIX_TOKENS, seed=1000 + seed)
    first, second = (
        generate(client, torch.cat((begin, _prompts(1, 8, seed=other)), dim=1), 1).seconds_to_first for other in (1, 2)
    )
    return second / first


def _prompts(num_prompts: int, num_tokens: int, seed: int) -> torch.Tensor:
    """Random tokens, [B, T]. Their values do not affect the speed."""
    return torch.randint(3, VOCABULARY, (num_prompts, num_tokens), generator=torch.Generator().manual_seed(seed))


def _all(ratios: tuple[float, ...]) -> str:
    return f"{median(ratios):.2f} [{min(ratios):.2f}..{max(ratios):.2f}]"


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="tokens that each client decodes in a round")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    load_before = os.getloadavg()[0]
    rows = [measure(family, rounds=arguments.rounds, num_tokens=arguments.tokens) for family in arguments.only]
    if arguments.json:
        about = {"machine": describe_machine(), "date": str(date.today()), "load_before": load_before}
        print(json.dumps({**about, "rounds": arguments.rounds, "rows": [asdict(each) for each in rows]}, indent=2))
        return
    print(f"{describe_machine()}; load before {load_before:.1f}\n")
    print("| family | shapes of | weights | 8 clients | local batch of 8 | ratio | goal | | prefix | |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        verdicts = ["met" if met else "missed" for met in (row.ratio >= row.goal, row.prefix <= PREFIX_GOAL)]
        print(
            f"| `{row.family}` | {row.model} | {row.num_weights / 1e9:.2f} B | {row.swarm:.3g} | {row.local:.3g} tok/s "
            f"| **{_all(row.ratios)}** | ≥ {row.goal:g} | {verdicts[0]} | {row.prefix:.2f} | {verdicts[1]} |"
        )


if __name__ == "__main__":
    main()
