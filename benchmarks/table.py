"""The speed of a swarm on this machine, compared with plain Transformers and the whole model, in one run.

    python -m benchmarks.table [--rounds 3] [--only decode-1 decode-8 ...] [--json]

The model is the reference model in bf16, or NF4 where a row says so. Two servers of 8 blocks are processes on loopback;
the clients are threads of this process. Where several clients decode, the last server computes the output head. The
local model and the swarm take turns, so that other load on the machine affects both. Ratios compare figures of the same
round; the table has their medians.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.common.clients import decoding_speed, generate, generate_together, local_batch_speed, median
from benchmarks.common.machine import describe_machine
from benchmarks.common.reference import reference_model
from benchmarks.common.swarm import servers
from shoal import AutoDistributedModelForCausalLM
from shoal.host.processes import interruptible

SPANS = ("0:8", "8:16")
PROMPT_TOKENS = 64
DECODED_TOKENS = 64


@dataclass(frozen=True)
class Row:
    """One line of the table: the figure of the swarm, the figure to compare it with, their ratio, and the goal."""

    name: str
    unit: str
    swarm: float
    other: float
    ratio: float
    goal: str
    met: bool


class Bench:
    """The models that the rows need. Each is made at its first use."""

    def __init__(self, rounds: int, stack: contextlib.ExitStack) -> None:
        self.rounds = rounds
        self.folder = reference_model()
        self._stack = stack

    @functools.cached_property
    def local(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.bfloat16).eval()

    @functools.cached_property
    def local_nf4(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            self.folder,
            dtype=torch.bfloat16,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            ),
        ).eval()

    @functools.cached_property
    def swarm(self) -> Any:
        """A client that computes the output head itself."""
        return self._client(self._address(), remote_head=False)

    @functools.cached_property
    def thin(self) -> Any:
        """A client that leaves the output head to the last server."""
        return self._client(self._address(), remote_head=True)

    @functools.cached_property
    def swarm_nf4(self) -> Any:
        return self._client(self._address("--quantization", "nf4"), remote_head=False)

    @functools.cached_property
    def thin_nf4(self) -> Any:
        return self._client(self._address("--quantization", "nf4"), remote_head=True)

    @functools.cache  # noqa: B019 - the object lives as long as the script
    def _address(self, *options: str) -> str:
        return self._stack.enter_context(servers(self.folder, SPANS, *options, of_last=("--serve-head",)))

    def _client(self, address: str, *, remote_head: bool) -> Any:
        model = AutoDistributedModelForCausalLM.from_pretrained(
            self.folder, initial_peers=[address], dtype=torch.bfloat16, remote_head=remote_head
        )
        self._stack.callback(model.close)
        return model

    def each_round(self, name: str, act: Callable[[int], tuple[float, float]]) -> list[tuple[float, float]]:
        """The results of `act` in all rounds, without the first, which warms up."""
        outcomes = []
        for index in range(self.rounds + 1):
            swarm, other = act(index)
            if index:
                outcomes.append((swarm, other))
                print(f"{name}, round {index}: {swarm:.4g} {other:.4g} {swarm / other:.3f}", file=sys.stderr)
        return outcomes


def prompts_of(num_prompts: int, num_tokens: int, seed: int) -> torch.Tensor:
    """Random tokens, [B, T]. Their values do not affect the speed."""
    return torch.randint(2, 32000, (num_prompts, num_tokens), generator=torch.Generator().manual_seed(seed))


def row(name: str, unit: str, outcomes: list[tuple[float, float]], *, at_least: float) -> Row:
    ratio = median([swarm / other for swarm, other in outcomes])
    return Row(
        name,
        unit,
        median([swarm for swarm, _ in outcomes]),
        median([other for _, other in outcomes]),
        ratio,
        f"≥ {at_least:g}",
        ratio >= at_least,
    )


def decode(bench: Bench, *, num_clients: int, goal: float) -> Row:
    """Clients that decode at the same time, compared with one local batch of the same size."""

    def act(index: int) -> tuple[float, float]:
        prompts = prompts_of(num_clients, PROMPT_TOKENS, seed=index)
        other = local_batch_speed(bench.local, prompts, DECODED_TOKENS)
        client = bench.swarm if num_clients == 1 else bench.thin
        together = generate_together(client, prompts.split(1), DECODED_TOKENS + 1)
        return decoding_speed(together), other

    name = f"{num_clients} client{'s' * (num_clients > 1)}, bf16"
    return row(name, "tok/s", bench.each_round(name, act), at_least=goal)


def nf4_one(bench: Bench) -> Row:
    def act(index: int) -> tuple[float, float]:
        prompt = prompts_of(1, PROMPT_TOKENS, seed=index)
        other = decoding_speed(generate_together(bench.swarm, [prompt], DECODED_TOKENS + 1))
        return decoding_speed(generate_together(bench.swarm_nf4, [prompt], DECODED_TOKENS + 1)), other

    name = "1 client, NF4 swarm vs. bf16 swarm"
    return row(name, "tok/s", bench.each_round(name, act), at_least=3.0)


def nf4_eight(bench: Bench) -> Row:
    def act(index: int) -> tuple[float, float]:
        prompts = prompts_of(8, PROMPT_TOKENS, seed=index)
        other = local_batch_speed(bench.local_nf4, prompts, DECODED_TOKENS)
        return decoding_speed(generate_together(bench.thin_nf4, prompts.split(1), DECODED_TOKENS + 1)), other

    name = "8 clients, NF4 swarm vs. local NF4"
    return row(name, "tok/s", bench.each_round(name, act), at_least=0.8)


def prefill(bench: Bench) -> Row:
    def act(index: int) -> tuple[float, float]:
        prompt = prompts_of(1, 512, seed=index)
        other = generate(bench.local, prompt, 1).seconds_to_first
        return 512 / generate(bench.swarm, prompt, 1).seconds_to_first, 512 / other

    name = "prefill of 512 tokens, bf16"
    return row(name, "tok/s", bench.each_round(name, act), at_least=0.9)


def prefix(bench: Bench) -> Row:
    """Seconds to the first token of a second request with the same prefix of 1,000 tokens, compared with the first."""

    def act(index: int) -> tuple[float, float]:
        begin = prompts_of(1, 1000, seed=1000 + index)
        first, second = (
            generate(bench.swarm, torch.cat((begin, prompts_of(1, 8, seed=other)), dim=1), 1).seconds_to_first
            for other in (1, 2)
        )
        return second, first

    outcomes = bench.each_round("prefix", act)
    ratio = median([second / first for second, first in outcomes])
    seconds = (median([second for second, _ in outcomes]), median([first for _, first in outcomes]))
    return Row("first token, cached prefix vs. new prefix", "s", *seconds, ratio, "≤ 0.15", ratio <= 0.15)


def beside_a_prefill(bench: Bench) -> list[Row]:
    """Seconds per token of 8 clients during a prefill of 4,096 tokens, compared with those without it."""
    prompts = prompts_of(8, PROMPT_TOKENS, seed=0).split(1)
    long_prompt = prompts_of(1, 4096, seed=7)
    span: dict[str, float] = {}

    def prefill_long_prompt() -> None:
        time.sleep(4)
        span["start"] = time.perf_counter()
        generate(bench.thin, long_prompt, 1)
        span["end"] = time.perf_counter()

    generate_together(bench.thin, prompts, 8)
    guest = threading.Thread(target=prefill_long_prompt)
    guest.start()
    gaps = [gap for each in generate_together(bench.thin, prompts, 400) for gap in each.gaps()]
    guest.join()
    alone = median([gap for came, gap in gaps if came < span["start"] or came > span["end"] + 1])
    beside = [gap for came, gap in gaps if span["start"] < came <= span["end"]]
    if not beside:
        raise SystemExit("no client decoded while the long prompt was computed")
    print(f"a prompt of 4,096 tokens took {span['end'] - span['start']:.1f} s beside 8 clients", file=sys.stderr)
    return [
        Row("token during a prefill vs. alone, median", "s", median(beside), alone, median(beside) / alone, "≤ 2",
            median(beside) <= 2 * alone),
        Row("token during a prefill vs. alone, worst", "s", max(beside), alone, max(beside) / alone, "≤ 4",
            max(beside) <= 4 * alone),
    ]  # fmt: skip


ROWS: dict[str, Callable[[Bench], Row | list[Row]]] = {
    "decode-1": functools.partial(decode, num_clients=1, goal=1.2),
    "decode-8": functools.partial(decode, num_clients=8, goal=0.85),
    "decode-32": functools.partial(decode, num_clients=32, goal=0.8),
    "prefill": prefill,
    "prefix": prefix,
    "beside-prefill": beside_a_prefill,
    "nf4-1": nf4_one,
    "nf4-8": nf4_eight,
}


def rows_of(names: list[str], rounds: int) -> Iterator[Row]:
    with contextlib.ExitStack() as stack:
        bench = Bench(rounds, stack)
        for name in names:
            result = ROWS[name](bench)
            yield from result if isinstance(result, list) else [result]


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    load_before = os.getloadavg()[0]
    rows = list(rows_of(arguments.only, arguments.rounds))
    if arguments.json:
        about = {"machine": describe_machine(), "date": str(date.today()), "load_before": load_before}
        print(json.dumps({**about, "rounds": arguments.rounds, "rows": [asdict(each) for each in rows]}, indent=2))
        return
    print(f"{describe_machine()}; load before {load_before:.1f}\n")
    print("| what | swarm | against | unit | ratio | goal | |")
    print("|---|---|---|---|---|---|---|")
    for each in rows:
        verdict = "met" if each.met else "missed"
        print(
            f"| {each.name} | {each.swarm:.3g} | {each.other:.3g} | {each.unit} | **{each.ratio:.2f}** | {each.goal} "
            f"| {verdict} |"
        )


if __name__ == "__main__":
    main()
