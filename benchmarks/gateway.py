"""HTTP clients of a gateway, streams and `generate()` in threads, compared with one local batch, in one run.

    python -m benchmarks.gateway [--clients 1 8 32] [--tokens 64] [--rounds 3] [--json]

The model is the reference model in bf16. Two servers of 8 blocks and the gateway are processes on loopback; the last
server computes the output head. The local model and the others take turns. The HTTP clients are one process, and each
reads a stream of server-sent events. Ratios compare figures of the same round; the table has medians. In bf16, what is
computed together may decide between tokens that are nearly equal, as with any batch, so answers are not compared.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import openai
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM

from benchmarks.common.clients import Generation, decoding_speed, generate_together, local_batch_speed
from benchmarks.common.machine import describe_machine
from benchmarks.common.reference import reference_model
from benchmarks.common.swarm import benchmarked, servers, started
from benchmarks.table import PROMPT_TOKENS, SPANS, prompts_of
from shoal import AutoDistributedModelForCausalLM
from shoal.host.processes import interruptible

WAYS = ("local batch", "generate() in threads", "streams", "HTTP")


@dataclass(frozen=True)
class Row:
    """Clients at the same time, in one of the ways: tokens per second, their ratio to the local batch, first token."""

    clients: int
    way: str
    tokens_per_second: float
    ratio: float
    first_token_seconds: float | None


@contextlib.contextmanager
def with_tokenizer(model: Path) -> Iterator[Path]:
    """The same model with a tokenizer: each token is a word, its number."""
    vocabulary = transformers.AutoConfig.from_pretrained(model).vocab_size
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "reference"
        folder.mkdir()
        for path in model.iterdir():
            (folder / path.name).symlink_to(path)
        words = {str(token): token for token in range(vocabulary)}
        Tokenizer(WordLevel(words, unk_token="0")).save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "0"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        yield folder


@contextlib.contextmanager
def gateway(model: Path, address: str) -> Iterator[str]:
    """A gateway process; yields its base URL."""
    options = ("--initial-peers", address, "--port", "0", "--dtype", "bfloat16", "--remote-head")
    with benchmarked() as children:
        yield started(children, "gateway", "gateway", str(model), *options).facts["address"]


async def stream_one(model: Any, prompt: torch.Tensor, num_tokens: int) -> Generation:
    """A stream in this process."""
    began, times, ids = time.perf_counter(), [], []
    options = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False}
    async with model.stream(prompt, **options) as stream:
        async for token in stream:
            times.append(time.perf_counter())
            ids.append(token.id)
    return Generation(began, times, ids)


async def ask_one(client: openai.AsyncOpenAI, prompt: torch.Tensor, num_tokens: int) -> Generation:
    """A stream of events from the gateway. Its words are the tokens' numbers."""
    began, times, text = time.perf_counter(), [], ""
    stream = await client.completions.create(
        model="reference", prompt=prompt[0].tolist(), max_tokens=num_tokens, temperature=0, stream=True
    )
    async for chunk in stream:
        times.append(time.perf_counter())
        text += chunk.choices[0].text
    return Generation(began, times, [int(word) for word in text.split()])


def measure(clients: Sequence[int], num_tokens: int, rounds: int) -> list[Row]:
    """All rows, in turns; the first round warms up."""
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(with_tokenizer(reference_model()))
        local = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        address = stack.enter_context(servers(folder, SPANS, of_last=("--serve-head",)))
        model = AutoDistributedModelForCausalLM.from_pretrained(
            folder, initial_peers=[address], dtype=torch.bfloat16, remote_head=True
        )
        stack.callback(model.close)
        url = stack.enter_context(gateway(folder, address))

        async def streams(prompts: Sequence[torch.Tensor]) -> list[Generation]:
            return await asyncio.gather(*(stream_one(model, prompt, num_tokens + 1) for prompt in prompts))

        async def requests(prompts: Sequence[torch.Tensor]) -> list[Generation]:
            async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
                return await asyncio.gather(*(ask_one(client, prompt, num_tokens + 1) for prompt in prompts))

        for count in clients:
            found: dict[str, list[tuple[float, float | None]]] = {way: [] for way in WAYS}
            for number in range(rounds + 1):
                prompts_BT = prompts_of(count, PROMPT_TOKENS, seed=number)
                prompts = prompts_BT.split(1)
                speed = local_batch_speed(local, prompts_BT, num_tokens)
                threads = generate_together(model, prompts, num_tokens + 1)
                streamed = asyncio.run(streams(prompts))
                asked = asyncio.run(requests(prompts))
                same = sum(one.tokens == other.tokens for one, other in zip(streamed, asked, strict=True))
                print(f"{same} of {count} answers over HTTP are those of the streams", file=sys.stderr)
                if not number:
                    continue
                found[WAYS[0]].append((speed, None))
                for way, each in zip(WAYS[1:], (threads, streamed, asked), strict=True):
                    found[way].append((decoding_speed(each), statistics.median(one.seconds_to_first for one in each)))
                shown = ", ".join(f"{way} {found[way][-1][0]:.4g}" for way in WAYS)
                print(f"{count} clients, round {number}: {shown}", file=sys.stderr)
            for way in WAYS:
                ratios = [mine / other for (mine, _), (other, _) in zip(found[way], found[WAYS[0]], strict=True)]
                firsts = [first for _, first in found[way] if first is not None]
                rows.append(
                    Row(
                        count,
                        way,
                        statistics.median(speed for speed, _ in found[way]),
                        statistics.median(ratios),
                        statistics.median(firsts) if firsts else None,
                    )
                )
    return rows


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    rows = measure(arguments.clients, arguments.tokens, arguments.rounds)
    if arguments.json:
        print(json.dumps({"machine": describe_machine(), "rows": [asdict(row) for row in rows]}))
        return
    print(f"{describe_machine()}\n")
    print("| clients | way | tokens/s | of a local batch | first token |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        first = "" if row.first_token_seconds is None else f"{1000 * row.first_token_seconds:.0f} ms"
        print(f"| {row.clients} | {row.way} | {row.tokens_per_second:.1f} | {row.ratio:.2f} | {first} |")


if __name__ == "__main__":
    main()
