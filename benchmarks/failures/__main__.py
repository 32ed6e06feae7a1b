"""The speed of decoding through servers that fail, compared with the same servers without failures.

    python -m benchmarks.failures [--tokens 128 1024] [--window N] [--rates 1e-3 1e-2 1e-1] [--rounds 1] [--cap 30]
        [--modes ours standby restarting no-caches guessing] [--kills 8] [--threads 1] [--quick] [--json]

The model is the reference model in bf16, in four stages of four blocks with two servers each. With one client that is
nine processes on this machine, with `--threads` threads each. With `--quick` it is the bundled model in float32, where
no failure may change a token; the exit status is 1 if one does. Before each step, each server draws at random whether
it fails (`failing_server.py`).

* ours: a failed server is replaced, and its inputs are replayed.
* standby: the same, with a second server of each stage kept warm.
* restarting: the client has no retry loop. When a server fails, it starts again from the first token.
* no-caches: each token is a forward pass over all tokens so far. When a server fails, the pass is repeated.

The last two are the baselines of the paper (arXiv 2312.08361, table 1). A baseline that is not done after `--cap`
seconds "did not finish". Its expected speed is computed from measured steps. Let q = 1 - (1 - p)^4 be the probability
that a stage fails in a step. Then restarting takes ((1 - q)^-N - 1) / q steps for N tokens, and a pass without caches
is computed 1 / (1 - q) times. Speeds are tokens per second of the whole generation. Ratios compare with ours without
failures, in the same round.

A full run generates about 22,000 tokens besides the baselines: half an hour at 12 tokens per second. With `--window N`,
only the N tokens in the middle of a longer generation are computed, after a prompt of as many tokens as come before
them. The cost of a failure grows linearly with its position, so the mean is that of the whole generation. Baselines are
then not run; only their expected speeds are printed.

At the end, a server in use is killed (SIGKILL) with 1,024 tokens in the session, `--kills` times. The result is the
longest gap between two tokens, in steps. With the mode `guessing`, the same is done to a session whose steps carry
guesses, 85 of 100 of which are right, as many as it finds worth it or a fixed number (`--guesses`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

import shoal
from benchmarks.common.baselines import (
    expected_restarting,
    expected_without_caches,
    restarting,
    without_caches,
    without_retries,
)
from benchmarks.common.clients import Generation, TookTooLong, generate
from benchmarks.common.machine import describe_machine
from benchmarks.common.reference import reference_model
from benchmarks.failures.stages import FailingServer, Stages, stages_of
from benchmarks.failures.tables import MODES, Gap, Run, print_gaps, print_runs
from benchmarks.speculation import KnownText
from shoal import AutoDistributedModelForCausalLM
from shoal.host.processes import interruptible

QUICK_MODEL = Path(shoal.__file__).parent / "bundled" / "stories"
NUM_STAGES = 4
PROMPT_TOKENS = 8  # less than a page, so that no server has cached the prompt
TOKENS_PER_ROUND = 512
"""Short generations are repeated until they have this many tokens, since at low rates few of them meet a failure."""
ACCEPTANCE = 0.85
"""How many of the guesses are right, in the mode that guesses."""
SAME_STEP = 0.002
"""Tokens that come so soon after one another came with one step."""
MAX_SECONDS = 900.0
"""The limit for ours, which always finishes. A run that reaches it is reported as not finished."""


class Bench:
    """The stages, and a client for each mode."""

    def __init__(
        self,
        stages: Stages,
        model: Path,
        *,
        dtype: str,
        modes: Sequence[str],
        cap: float,
        window: int | None,
        vocabulary: int,
        guesses: int | None,
    ) -> None:
        self._stages = stages
        self._window = window
        self._cap = cap
        self._dtype = dtype
        self._vocabulary = vocabulary
        self._modes = modes
        self._clients: dict[str, Any] = {"ours": self._client(model)}
        if "standby" in modes:
            self._clients["standby"] = self._client(model, standby=True)
        if "guessing" in modes:
            self._clients["guessing"] = self._clients["ours"]
        self._guesses = guesses
        self._unprotected = self._client(model)
        without_retries(self._unprotected)

    def _client(self, model: Path, **options: Any) -> Any:
        client = AutoDistributedModelForCausalLM.from_pretrained(
            model, initial_peers=[self._stages.address], dtype=self._dtype, **options
        )
        generate(client, self._prompt(0, PROMPT_TOKENS), 8)
        return client

    def close(self) -> None:
        for client in (*self._clients.values(), self._unprotected):
            client.close()

    def _prompt(self, seed: int, num_tokens: int) -> torch.Tensor:
        return torch.randint(3, self._vocabulary, (1, num_tokens), generator=torch.Generator().manual_seed(seed))

    # -- random failures ---------------------------------------------------------------------------------------------

    def runs(self, lengths: Sequence[int], rates: Sequence[float], rounds: int) -> Iterator[Run]:
        """All runs. Each length and round begins with ours without failures."""
        for num_tokens in lengths:
            repeats = max(1, TOKENS_PER_ROUND // num_tokens)
            for index in range(rounds * repeats):
                undisturbed = self._timed("ours", num_tokens, 0.0, index)
                yield self._run("ours", num_tokens, 0.0, undisturbed, undisturbed)
                for mode in self._modes:
                    if mode == "guessing":
                        continue  # it is measured by kills
                    if mode in self._clients:
                        for rate in (0.0, *rates) if mode != "ours" else rates:
                            timed = self._timed(mode, num_tokens, rate, index)
                            yield self._run(mode, num_tokens, rate, timed, undisturbed)
                    elif index % repeats == 0:
                        yield from self._baseline(mode, num_tokens, rates, index, undisturbed)

    def _timed(self, mode: str, num_tokens: int, rate: float, seed: int) -> tuple[float, Generation | None, int]:
        """The seconds, the generation (None if it did not finish), and the number of failures."""
        self._stages.fail_at(rate, seed)
        began = time.perf_counter()
        generation = None
        with contextlib.suppress(TookTooLong):
            deadline = began + MAX_SECONDS
            num_prompt, num_new = self._part_of(num_tokens)
            generation = generate(self._clients[mode], self._prompt(seed, num_prompt), num_new, deadline=deadline)
        seconds = time.perf_counter() - began
        if generation is not None and num_new < num_tokens:  # scale the window to the whole generation
            seconds = (generation.times[-1] - generation.times[0]) * num_tokens / (num_new - 1)
        return seconds, generation, self._stages.fail_at(0.0, seed)

    def _part_of(self, num_tokens: int) -> tuple[int, int]:
        """The numbers of prompt tokens and new tokens that stand for a generation of `num_tokens`."""
        if self._window is None or num_tokens <= self._window:
            return PROMPT_TOKENS, num_tokens
        return (num_tokens - self._window) // 2, self._window

    def _run(
        self,
        mode: str,
        num_tokens: int,
        rate: float,
        timed: tuple[float, Generation | None, int],
        undisturbed: tuple[float, Generation | None, int],
    ) -> Run:
        seconds, generation, num_failures = timed
        reference = undisturbed[1]
        done = generation is not None and reference is not None
        return Run(
            mode,
            num_tokens,
            rate,
            num_tokens / seconds if done else None,
            undisturbed[0] / seconds if done else None,
            None,
            num_failures,
            generation.tokens == reference.tokens if generation is not None and reference is not None else None,
        )

    # -- the baselines ------------------------------------------------------------------------------------------------

    def _baseline(
        self,
        mode: str,
        num_tokens: int,
        rates: Sequence[float],
        seed: int,
        undisturbed: tuple[float, Generation | None, int],
    ) -> Iterator[Run]:
        prompt, client = self._prompt(seed, PROMPT_TOKENS), self._unprotected
        if mode == "no-caches":
            rates = (0.0, *rates)
            self._stages.fail_at(0.0, seed)
            expected = expected_without_caches(client, prompt, num_tokens)
        else:
            assert undisturbed[1] is not None
            expected = expected_restarting(undisturbed[1], num_tokens)
        for rate in rates:
            self._stages.fail_at(rate, seed)
            run = restarting if mode == "restarting" else without_caches
            whole = self._part_of(num_tokens)[1] == num_tokens
            seconds = run(client, prompt, num_tokens, cap=self._cap) if whole else None
            yield Run(
                mode,
                num_tokens,
                rate,
                None if seconds is None else num_tokens / seconds,
                None if seconds is None else undisturbed[0] / seconds,
                num_tokens / expected(1 - (1 - rate) ** NUM_STAGES),
                self._stages.fail_at(0.0, seed),
                None,
            )

    # -- killed servers ----------------------------------------------------------------------------------------------

    def gaps(self, num_kills: int, num_prompt: int, *, before: int = 48, after: int = 16) -> Iterator[Gap]:
        """Kill a server of each stage in turn, at a random moment of a step, after a prompt of `num_prompt` tokens."""
        for mode, client in self._clients.items():
            if mode in self._modes:
                for index in range(num_kills):
                    yield self._gap(mode, client, index, num_prompt, before, after)

    def _gap(self, mode: str, client: Any, index: int, num_prompt: int, before: int, after: int) -> Gap:
        chance = random.Random(index)
        prompt, draft = self._prompt(1000 + index, num_prompt), None
        wanted: Sequence[int] = ()
        if mode == "guessing":
            after *= 8  # several come with a step, and some have to come after the kill
            wanted = told(client, prompt, before + after, draft="off").tokens
            draft = KnownText([*prompt[0].tolist(), *wanted], ACCEPTANCE, says=ACCEPTANCE, seed=index)
        self._stages.fail_at(0.0, index)
        killed: list[tuple[float, FailingServer]] = []

        def kill(victim: FailingServer) -> None:
            victim.process.kill()
            killed.append((time.perf_counter(), victim))

        with client.inference_session(max_length=num_prompt + before + after + 1) as session:

            def came(num_tokens: int) -> None:
                if num_tokens == before:
                    victim = self._stages.of_peer(session.servers[index % NUM_STAGES])
                    timer.args = (victim,)
                    timer.start()

            timer = threading.Timer(chance.uniform(0, 0.1), kill)
            if draft is None:
                generation = generate(client, prompt, before + after, came=came, session=session)
            else:
                guesses = self._guesses
                generation = told(client, prompt, before + after, came=came, draft=draft, num_guesses=guesses)
            timer.join()
        gaps = generation.gaps()
        when, victim = killed[0]
        self._stages.replace(victim)
        return Gap(
            mode,
            max(seconds for at, seconds in gaps if at > when),
            statistics.median(seconds for at, seconds in gaps if at < when and seconds > SAME_STEP),
            generation.tokens == wanted if wanted else None,
        )


def told(
    client: Any, prompt: torch.Tensor, num_tokens: int, *, came: Callable[[int], None] | None = None, **how: Any
) -> Generation:
    """A stream of these tokens. After each, `came` is called with the number of tokens so far."""
    began, times, tokens = time.perf_counter(), list[float](), list[int]()
    how |= {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "attention_mask": torch.ones_like(prompt)}
    with client.stream(prompt, **how) as stream:
        for token in stream:
            times.append(time.perf_counter())
            tokens.append(token.id)
            if came is not None:
                came(len(tokens))
    return Generation(began, times, tokens)


@interruptible()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[128, 1024])
    parser.add_argument("--rates", type=float, nargs="*", default=[1e-3, 1e-2, 1e-1])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cap", type=float, default=30.0, help="seconds for a run of a baseline")
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--guesses", type=int, help="how many a step of the mode guessing carries; default: measured")
    parser.add_argument(
        "--window", type=int, help="compute only this many tokens, in the middle of a longer generation"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of each server")
    parser.add_argument("--quick", action="store_true", help="use the bundled model and shorter runs")
    parser.add_argument("--json", action="store_true")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(tokens=[32, 64], rates=[1e-2, 1e-1], cap=10.0, kills=4)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    load_before = os.getloadavg()[0]
    num_prompt, dtype = (256, "float32") if arguments.quick else (1024, "bfloat16")
    model = QUICK_MODEL if arguments.quick else reference_model()
    config = transformers.AutoConfig.from_pretrained(model)
    runs: list[Run] = []
    gaps: list[Gap] = []
    stages_ = stages_of(
        model, config.num_hidden_layers, num_stages=NUM_STAGES, dtype=dtype, num_threads=arguments.threads
    )
    with stages_ as stages:
        bench = Bench(
            stages,
            model,
            dtype=dtype,
            modes=arguments.modes,
            cap=arguments.cap,
            window=arguments.window,
            vocabulary=config.vocab_size,
            guesses=arguments.guesses,
        )
        try:
            for run in bench.runs(arguments.tokens, arguments.rates, arguments.rounds):
                runs.append(run)
                print(run, file=sys.stderr)
            for gap in bench.gaps(arguments.kills, num_prompt):
                gaps.append(gap)
                print(gap, file=sys.stderr)
        finally:
            bench.close()
    if arguments.json:
        about = {"machine": describe_machine(), "date": str(date.today()), "load_before": load_before}
        print(json.dumps({**about, "runs": [asdict(run) for run in runs], "gaps": [asdict(gap) for gap in gaps]}))
    else:
        print_all(runs, gaps, load_before, num_prompt)
    return int(arguments.quick and any(each.same_tokens is False for each in (*runs, *gaps)))


def print_all(runs: Sequence[Run], gaps: Sequence[Gap], load_before: float, num_prompt: int) -> None:
    print(f"{describe_machine()}; load before {load_before:.1f}\n")
    print_runs(runs)
    if gaps:
        print_gaps(gaps, num_prompt)


if __name__ == "__main__":
    sys.exit(main())
