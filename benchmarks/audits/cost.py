"""What audits and receipts cost a swarm that nobody attacks.

    python -m benchmarks.audits.cost [--rounds 20] [--clients 1 8] [--tokens 32] [--model FOLDER] [--dtype bfloat16]

Four servers are processes on this machine, two for each half of the model, by default the reference model, so that each
half has a witness. Two clients decode in turns: one as clients are by default, with audits at "low" and receipts, and
one without either. Which of them is first changes from round to round. Both are open all the time, so what is audited
of a new server is told apart: it costs once, in the rounds that warm up. All compute on the same cores, witnesses too,
which are other machines elsewhere. So the table has two figures: the time that a token takes here, and the processor
time that all processes together take for it, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import transformers

from benchmarks.common.clients import decoding_speed, generate_together
from benchmarks.common.machine import cpu_seconds, describe_machine
from benchmarks.common.reference import reference_model
from benchmarks.common.swarm import servers
from benchmarks.table import PROMPT_TOKENS, prompts_of
from shoal import AutoDistributedModelForCausalLM
from shoal.events import ServerAudited
from shoal.host.processes import interruptible

WARM_UPS = 2
"""Rounds that do not count: connections are opened, and all four servers have their first audits."""
MODES = ("low", "off")


@dataclass(frozen=True)
class Cost:
    """The time that a token took, and the processor time of all processes for it."""

    seconds: float
    processor_seconds: float


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

    def round(self, number: int, num_clients: int, num_tokens: int) -> dict[str, Cost]:
        """What a token of all clients together takes, by mode."""
        prompts, this, found = prompts_of(num_clients, PROMPT_TOKENS, seed=number), psutil.Process(), {}
        for mode in MODES if number % 2 else MODES[::-1]:
            began = cpu_seconds(this)
            together = generate_together(self._clients[mode], prompts.split(1), num_tokens)
            used = cpu_seconds(this) - began
            found[mode] = Cost(1 / decoding_speed(together), used / (num_clients * num_tokens))
        return found


def row(num_clients: int, rounds: Sequence[dict[str, Cost]]) -> str:
    """A row of the table: means, their ratio, and the middle half of the ratios of rounds. Few rounds have an audit, so
    medians would leave them out."""
    cells = []
    for name in ("seconds", "processor_seconds"):
        on, off = ([getattr(each[mode], name) for each in rounds] for mode in MODES)
        low, _, high = statistics.quantiles([one / other for one, other in zip(on, off, strict=True)], n=4)
        means = statistics.mean(on), statistics.mean(off)
        cells.append(
            f"{1e3 * means[0]:.1f} | {1e3 * means[1]:.1f} | **{means[0] / means[1]:.3f}** ({low:.2f} to {high:.2f})"
        )
    return f"| {num_clients} | {' | '.join(cells)} |"


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=32)
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
                rounds.append(bench.round(number, num_clients, arguments.tokens))
                print(f"{num_clients} clients, round {number - WARM_UPS + 1}: {rounds[-1]}", file=sys.stderr)
            rows.append(row(num_clients, rounds[WARM_UPS:]))
        print(describe_machine())
        print(f"{arguments.rounds} rounds of {arguments.tokens} tokens; audits: {dict(bench.findings)}\n")
        print("| clients | ms a token, with audits and receipts | without | ratio | processor ms | without | ratio |")
        print("|---|---|---|---|---|---|---|")
        print("\n".join(rows))


if __name__ == "__main__":
    main()
