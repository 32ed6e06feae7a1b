"""Many HTTP clients of a gateway, half of whom hang up in the middle, while servers are killed.

    python -m benchmarks.soak.gateway [--minutes 5] [--clients 64] [--seed 0]

The bundled model in float32, two servers for each of three spans, and a gateway, all of them processes on this machine.
Every minute a server is killed (SIGKILL) and started again. Each client asks again and again, for one of twenty greedy
answers; what comes is compared with the whole model's. At the end, the servers' caches must be empty again. The exit
status is 1 after a wrong token, an error, or a cache that is not empty.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import openai
import psutil
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common.clients import announced
from benchmarks.common.machine import describe_machine
from shoal import AutoDistributedModelForCausalLM
from shoal.bundled import STORIES
from shoal.host.processes import Child, interruptible
from shoal.testing import ShapedSwarm, shaped_swarm

SPANS = ("0:4", "4:8", "8:12", "0:4", "4:8", "8:12")
NUM_PROMPTS = 20
NUM_TOKENS = 48
KILL_SECONDS = 60.0
EMPTY_SECONDS = 60.0
"""So long after the last answer, all caches must be empty."""


@dataclass
class Tally:
    """What happened."""

    answers: int = 0
    cut: int = 0
    tokens: int = 0
    wrong: int = 0
    kills: int = 0
    longest_gap: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)


def expected_answers() -> tuple[list[list[int]], list[str]]:
    """Prompts as tokens, and what the whole model answers."""
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    chance = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, model.config.vocab_size, (1, 12), generator=chance) for _ in range(NUM_PROMPTS)]
    texts = []
    for prompt in prompts:
        found = model.generate(prompt, max_new_tokens=NUM_TOKENS, do_sample=False)
        texts.append(str(tokenizer.decode(found[0, prompt.shape[1] :], skip_special_tokens=True)))
    return [prompt[0].tolist() for prompt in prompts], texts


async def ask(
    client: openai.AsyncOpenAI,
    prompts: Sequence[list[int]],
    texts: Sequence[str],
    tally: Tally,
    until: float,
    rng: random.Random,
) -> None:
    """One client, until the time is up."""
    while time.monotonic() < until:
        which = rng.randrange(len(prompts))
        hang_up_after = rng.randrange(NUM_TOKENS) if rng.random() < 0.5 else None
        text, came = "", time.monotonic()
        try:
            stream = await client.completions.create(
                model="stories", prompt=prompts[which], max_tokens=NUM_TOKENS, temperature=0, stream=True
            )
            async with stream:
                number = 0
                async for chunk in stream:
                    now = time.monotonic()
                    tally.longest_gap = max(tally.longest_gap, now - came)
                    came, number = now, number + 1
                    text += chunk.choices[0].text
                    tally.tokens += 1
                    if number == hang_up_after:
                        break
        except openai.OpenAIError as error:
            tally.errors[f"{type(error).__name__}: {error}"] += 1
            continue
        if hang_up_after is None:
            tally.answers += 1
            tally.wrong += text != texts[which]
        else:
            tally.cut += 1
            tally.wrong += not texts[which].startswith(text)


async def kill(swarm: ShapedSwarm, tally: Tally, until: float, rng: random.Random) -> None:
    """Every minute, one server."""
    while time.monotonic() + KILL_SECONDS < until:
        await asyncio.sleep(KILL_SECONDS)
        server = rng.choice(swarm.servers[1:])
        print(f"{server.name} {server.span} is killed", file=sys.stderr)
        await asyncio.to_thread(server.kill)
        tally.kills += 1
        await asyncio.to_thread(server.restart)


async def soak(
    swarm: ShapedSwarm, gateway: Child, prompts: Sequence[list[int]], texts: Sequence[str], options: argparse.Namespace
) -> Tally:
    tally, rng = Tally(), random.Random(options.seed)
    until = time.monotonic() + 60 * options.minutes
    process = psutil.Process(gateway.process.pid)
    async with openai.AsyncOpenAI(base_url=gateway.facts["address"], api_key="none", max_retries=0) as client:
        asking = [
            asyncio.create_task(ask(client, prompts, texts, tally, until, random.Random(rng.random())))
            for _ in range(options.clients)
        ]
        killing = asyncio.create_task(kill(swarm, tally, until, rng))
        while not all(task.done() for task in asking):
            await asyncio.wait(asking, timeout=30)
            size = process.memory_info().rss >> 20
            print(f"{tally.answers} answers, {tally.cut} cut, {tally.wrong} wrong, {size} MiB", file=sys.stderr)
        await asyncio.gather(*asking, killing)
    return tally


def rooms(swarm: ShapedSwarm) -> list[int]:
    """The cache that each server has left, as a new client sees it."""
    model = AutoDistributedModelForCausalLM.from_pretrained(STORIES, initial_peers=swarm.addresses, dtype=torch.float32)
    try:
        return sorted(server.cache_tokens_left for server in announced(model))
    finally:
        model.close()


@interruptible()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    prompts, texts = expected_answers()
    with shaped_swarm(STORIES, SPANS, options=["--dtype", "float32", "--cache-tokens", "16384"]) as swarm:
        empty = rooms(swarm)
        gateway = swarm.children.start(
            "gateway", "gateway", str(STORIES), "--initial-peers", *swarm.addresses, "--port", "0", "--dtype", "float32"
        )
        for _ in swarm.children.wait_for([gateway], seconds=120):
            pass
        tally = asyncio.run(soak(swarm, gateway, prompts, texts, options))
        deadline = time.monotonic() + EMPTY_SECONDS
        while (left := rooms(swarm)) != empty and time.monotonic() < deadline:
            time.sleep(2)
    print(describe_machine())
    print(
        f"{tally.answers} answers, {tally.cut} cut off, {tally.tokens} pieces, {tally.kills} kills: {tally.wrong} wrong"
    )
    print(f"longest wait {tally.longest_gap:.1f} s, errors {dict(tally.errors)}, room left {left} of {empty}")
    return int(bool(tally.wrong or tally.errors or left != empty))


if __name__ == "__main__":
    sys.exit(main())
