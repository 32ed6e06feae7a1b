"""The rows of `benchmarks.gpu.run`: each compares a swarm of two servers on the device with Transformers beside it."""

# B sequences, T tokens

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from benchmarks.common.clients import Generation, decoding_speed, generate
from benchmarks.common.tuning import Tuner
from benchmarks.step import chunks_of
from shoal import AutoDistributedModelForCausalLM
from shoal.model.loading import load_body
from shoal.model.weights.checkpoint import Checkpoint
from shoal.server.attention_backends.backend_choice import attention_of
from shoal.server.kv.batched_pass import pass_over
from shoal.server.kv.cache_shapes import cache_shapes
from shoal.server.kv.paged_cache import PagedCache
from shoal.server.kv.pages import pages_for
from shoal.spans import Span

ROUNDS = 2
"""Of each comparison, after one to warm up. The two sides take turns."""
STEPS = 20
CONTINUOUS_PAGE, CONTINUOUS_TOKENS = 256, 2048
"""The tokens of a page of Transformers' continuous batching, and of one of its passes."""


@dataclass(frozen=True)
class Setting:
    """What a row measures: the model's folder, a server's address, the device, and whether it is only tried."""

    folder: str
    address: str
    device: str
    tiny: bool

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Setting:
        return cls(**json.loads(text))

    def of(self, full: int, tiny: int) -> int:
        """A number of tokens or clients: smaller where the run is only tried."""
        return tiny if self.tiny else full

    @contextlib.contextmanager
    def client(self, **options: Any) -> Iterator[Any]:
        """The model with its blocks on the servers. Its own part is on the device too."""
        model = AutoDistributedModelForCausalLM.from_pretrained(
            self.folder, initial_peers=[self.address], dtype=torch.bfloat16, device=self.device, **options
        )
        try:
            yield model
        finally:
            model.close()

    def local(self) -> Any:
        """The whole model in this process."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.bfloat16, device_map=self.device).eval()

    def prompts(self, num_prompts: int, num_tokens: int, seed: int) -> list[torch.Tensor]:
        """Random tokens [1, T]. Their values do not affect the speed."""
        random = torch.Generator().manual_seed(seed)
        most = 500 if self.tiny else 100_000
        return [torch.randint(3, most, (1, num_tokens), generator=random) for _ in range(num_prompts)]

    def wait(self) -> None:
        """Wait until the device has computed what it was asked for."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Figure:
    """One line of the table. `ratio` is that of the first to the second, and `None` if there is no second."""

    name: str
    unit: str
    shoal: float
    other: float | None
    ratio: float | None
    goal: str
    met: bool


@dataclass(frozen=True)
class Row:
    """How something is measured, for how many seconds at most, and its goal in words."""

    act: Callable[[Setting], list[Figure]]
    seconds: float
    goal: str


def measure(name: str, setting: Setting) -> dict[str, Any]:
    """The figures of a row, or its failure, as JSON has them. The trace of a failure goes to stderr."""
    try:
        return {"figures": [asdict(each) for each in ROWS[name].act(setting)]}
    except Exception as error:  # whatever it is, the other rows are measured
        traceback.print_exc()
        text = " ".join(str(error).split()) or "no message"
        return {"failure": f"{type(error).__name__}: {text[:200]}".replace("|", "/")}


def compared(name: str, unit: str, rounds: Sequence[tuple[float, float]], at_least: float) -> Figure:
    """The medians of both sides, and of the ratios of the rounds."""
    ratio = statistics.median(mine / other for mine, other in rounds)
    mine, other = (statistics.median(side) for side in zip(*rounds, strict=True))
    return Figure(name, unit, mine, other, ratio, f"≥ {at_least:g}", ratio >= at_least)


def in_turns(
    setting: Setting, mine: Callable[[int], float], other: Callable[[int], float]
) -> list[tuple[float, float]]:
    """The figures of both sides in every round but the first."""
    found = []
    for index in range(1 + (1 if setting.tiny else ROUNDS)):
        found.append((mine(index), other(index)))
        print(f"round {index}: {found[-1][0]:.4g} {found[-1][1]:.4g}", file=sys.stderr, flush=True)
    return found[1:]


def decode_one(setting: Setting) -> list[Figure]:
    """One client, compared with `generate()` with a static cache, which Transformers compiles on a GPU."""
    prompt_tokens, new = setting.of(128, 8), setting.of(128, 8)
    local = setting.local()

    def act(model: Any, index: int, **options: Any) -> float:
        (prompt,) = setting.prompts(1, prompt_tokens, seed=index)
        return decoding_speed([generate(model, prompt.to(setting.device), new + 1, **options)])

    with setting.client() as model:
        rounds = in_turns(setting, partial(act, model), partial(act, local, cache_implementation="static"))
    speed = compared("1 client, decoding, against a static cache and compile", "tok/s", rounds, at_least=0.9)
    weight_bytes = sum(each.nbytes for each in local.parameters()) - local.get_input_embeddings().weight.nbytes
    bound = read_bandwidth(setting) / weight_bytes
    ratio = speed.shoal / bound
    return [speed, Figure("the same, of what memory allows", "tok/s", speed.shoal, bound, ratio, "≥ 0.5", ratio >= 0.5)]


def read_bandwidth(setting: Setting) -> float:
    """Bytes per second that the device reads, summing numbers that no cache holds."""
    numbers = torch.ones(setting.of(1 << 31, 1 << 24), dtype=torch.bfloat16, device=setting.device)
    return numbers.nbytes / seconds_of(setting, numbers.sum)


def seconds_of(setting: Setting, act: Callable[[], Any]) -> float:
    """The median seconds of what an act takes until the device is done, after two runs to warm up."""
    seconds = []
    for index in range(STEPS + 2):
        setting.wait()
        began = time.perf_counter()
        act()
        setting.wait()
        if index >= 2:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def decode_many(setting: Setting, num_clients: int) -> list[Figure]:
    """Streams of one client program, compared with Transformers' continuous batching of as many requests."""
    num_clients = setting.of(num_clients, num_clients // 8)
    prompt_tokens, new = setting.of(128, 8), setting.of(96, 8)
    local = setting.local()

    def streams(model: Any, index: int) -> float:
        prompts = setting.prompts(num_clients, prompt_tokens, seed=index)
        return decoding_speed(asyncio.run(together(model, prompts, new + 1)))

    def batched(index: int) -> float:
        prompts = setting.prompts(num_clients, prompt_tokens, seed=index)
        return continuous_speed(local, [each[0].tolist() for each in prompts], new + 1)

    with setting.client(remote_head=True) as model:
        rounds = in_turns(setting, partial(streams, model), batched)
    name = f"{num_clients} clients, decoding, against continuous batching"
    return [compared(name, "tok/s", rounds, at_least=0.9)]


async def together(model: Any, prompts: Sequence[torch.Tensor], num_tokens: int) -> list[Generation]:
    """Stream from all prompts at the same time."""

    async def one(prompt: torch.Tensor) -> Generation:
        began, times, tokens = time.perf_counter(), [], []
        options = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False}
        async with model.stream(prompt.to(model.device), **options) as stream:
            async for token in stream:
                times.append(time.perf_counter())
                tokens.append(token.id)
        return Generation(began, times, tokens)

    return list(await asyncio.gather(*map(one, prompts)))


def continuous_speed(model: Any, prompts: list[list[int]], num_tokens: int) -> float:
    """Tokens per second of Transformers' continuous batching, while all requests decode."""
    config = GenerationConfig(
        max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0, bos_token_id=1
    )
    # As much room as the requests need: otherwise it takes most of what the servers leave of the memory.
    longest = max(len(each) for each in prompts) + num_tokens
    num_blocks = (2 + longest // CONTINUOUS_PAGE) * len(prompts) + 8
    room = ContinuousBatchingConfig(num_blocks=num_blocks, max_batch_tokens=max(CONTINUOUS_TOKENS, len(prompts)))
    answers = model.generate_batch(
        inputs=prompts, generation_config=config, continuous_batching_config=room, record_timestamps=True
    )
    if len(answers) != len(prompts):
        raise RuntimeError(f"continuous batching answered {len(answers)} of {len(prompts)} requests")
    found = [Generation(0.0, each.timestamps, each.generated_tokens) for each in answers.values()]
    if any(len(each.times) != num_tokens for each in found):
        raise RuntimeError("continuous batching gave another number of tokens")
    return decoding_speed(found)


def prefill(setting: Setting) -> list[Figure]:
    """Seconds to the first token of a long prompt, as tokens per second."""
    num_tokens = setting.of(4096, 256)
    local = setting.local()

    def act(model: Any, index: int) -> float:
        (prompt,) = setting.prompts(1, num_tokens, seed=index)
        return num_tokens / generate(model, prompt.to(setting.device), 1).seconds_to_first

    with setting.client() as model:
        rounds = in_turns(setting, partial(act, model), partial(act, local))
    return [compared(f"prefill of {num_tokens:,} tokens", "tok/s", rounds, at_least=0.9)]


def step(setting: Setting) -> list[Figure]:
    """The time of a decoding pass of 8 sessions through half of the blocks in which the device computes nothing."""
    checkpoint = Checkpoint.open(setting.folder)
    span = Span(0, checkpoint.num_blocks // 2)
    body = load_body(checkpoint, span, dtype=torch.bfloat16, device=torch.device(setting.device))
    past = setting.of(512, 40)
    cache = PagedCache(body, cache_shapes(body), 8 * pages_for(past + 1))
    attention = attention_of(body, cache)
    compute = pass_over(body, cache, attention.backend)
    chunks = chunks_of(8, past, span, body.backbone.config.hidden_size)

    def act() -> None:
        for output in compute(chunks):
            if isinstance(output, Exception):
                raise output
            output.cpu()

    seconds = seconds_of(setting, act)
    on_device = setting.device.startswith("cuda")
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_device else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            act()
        setting.wait()
    of_event = "self_device_time_total" if on_device else "self_cpu_time_total"
    kernels = sum(getattr(each, of_event) for each in profiler.key_averages()) / STEPS / 1e6
    around = 1e3 * max(0.0, seconds - kernels)
    name = f"a pass of 8 sessions through {len(span)} blocks ({attention.name}): time around its kernels, of the whole"
    return [Figure(name, "ms", around, 1e3 * seconds, around / (1e3 * seconds), "≤ 1 ms", around <= 1)]


def lora(setting: Setting) -> list[Figure]:
    """Training steps of LoRA, compared with PEFT on the whole model in one process."""
    batch_size, num_tokens = setting.of(8, 2), setting.of(512, 32)

    def act(tuner: Tuner, index: int) -> float:
        tokens = torch.cat(setting.prompts(batch_size, num_tokens, seed=index)).to(setting.device)
        began = time.perf_counter()
        tuner.step(tokens)
        setting.wait()
        return tokens.numel() / (time.perf_counter() - began)

    with setting.client() as model:
        rounds = in_turns(setting, partial(act, Tuner(model)), partial(act, Tuner(setting.local())))
    return [compared(f"LoRA, training {batch_size}x{num_tokens}", "tok/s", rounds, at_least=0.85)]


ROWS = {
    "decode-1": Row(decode_one, 90, "≥ 0.9; ≥ 0.5 of memory"),
    "decode-32": Row(partial(decode_many, num_clients=32), 75, "≥ 0.9"),
    "decode-128": Row(partial(decode_many, num_clients=128), 90, "≥ 0.9"),
    "prefill": Row(prefill, 50, "≥ 0.9"),
    "step": Row(step, 50, "≤ 1 ms"),
    "lora": Row(lora, 80, "≥ 0.85"),
}


def describe_device(device: str) -> str:
    """The card by name, with its memory."""
    if not device.startswith("cuda"):
        return device
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
