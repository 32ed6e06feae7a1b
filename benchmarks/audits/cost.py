"""What audits and receipts cost a swarm that nobody attacks.

    python -m benchmarks.audits.cost [--rounds 5] [--clients 1 8] [--tokens 128] [--model FOLDER] [--dtype bfloat16]

Four servers are processes on this machine, two for each half of the model, by default the reference model, so that each
half has a witness. Two clients decode in turns: one as clients are by default, with audits at "low" and receipts, and
one without either. Which of them is first changes from round to round. Both are open all the time, so what is audited
of a new server is told apart: it costs once, in the rounds that warm up. All compute on the same cores, witnesses too.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.common.clients import decoding_speed, generate_together, median
from benchmarks.common.machine import describe_machine
from benchmarks.common.reference import reference_model
from benchmarks.common.swarm import servers
from shoal import AutoDistributedModelForCausalLM
from shoal.events import ServerAudited
from shoal.host.processes import interruptible

PROMPT_TOKENS = 64
WARM_UPS = 2
"""Rounds that do not count: connections are opened, and all four servers have their first audits."""
MODES = ("low", "off")


class Bench:
    """Two clients of one swarm, by what they do about audits, and the audits of the one that makes some."""

    def __init__(self, model: Path, dtype: str, stack: contextlib.ExitStack) -> None:
        num_blocks = transformers.AutoConfig.from_pretrained(model).num_hidden_layers
        spans = (f"0:{num_blocks // 2}", f"{num_blocks // 2}:{num_blocks}") * 2
        address = stack.enter_context(servers(model, spans, "--dtype", dtype))
        self.findings: Counter[str] = Counter()
        self._clients: dict[str, Any] = {}
        for mode in MODES:
            client = AutoDistributedModelForCausalLM.from_pretrained(
                model, initial_peers=[address], dtype=dtype, audits=mode, observers=[self._observe]
            )
            stack.callback(client.close)
            self._clients[mode] = client

    def _observe(self, event: object) -> None:
        if isinstance(event, ServerAudited):
            self.findings[event.finding] += 1

    def round(self, number: int, num_clients: int, num_tokens: int) -> dict[str, float]:
        """Tokens a second of all clients together, by mode."""
        prompts = torch.randint(2, 32000, (num_clients, PROMPT_TOKENS), generator=torch.Generator().manual_seed(number))
        found = {}
        for mode in MODES if number % 2 else MODES[::-1]:
            found[mode] = decoding_speed(generate_together(self._clients[mode], prompts.split(1), num_tokens))
        return found


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    rows = []
    with contextlib.ExitStack() as stack:
        bench = Bench(arguments.model or reference_model(), arguments.dtype, stack)
        for num_clients in arguments.clients:
            rounds = []
            for number in range(WARM_UPS + arguments.rounds):
                found = bench.round(number, num_clients, arguments.tokens)
                ratio = found["low"] / found["off"]
                print(f"{num_clients} clients, round {number - WARM_UPS + 1}: {found} {ratio:.3f}", file=sys.stderr)
                if number >= WARM_UPS:
                    rounds.append((found["low"], found["off"], ratio))
            speeds = [median([each[index] for each in rounds]) for index in range(3)]
            ratios = sorted(ratio for *_, ratio in rounds)
            rows.append(
                f"| {num_clients} | {speeds[0]:.1f} | {speeds[1]:.1f} | **{speeds[2]:.3f}** |"
                f" {ratios[0]:.3f} to {ratios[-1]:.3f} |"
            )
        print(describe_machine())
        print(f"{arguments.rounds} rounds of {arguments.tokens} tokens; audits: {dict(bench.findings)}\n")
        print(
            "| clients | with audits and receipts, tok/s | without | ratio | of single rounds |\n|---|---|---|---|---|"
        )
        print("\n".join(rows))


if __name__ == "__main__":
    main()
