"""Whether the numbers of a session depend on who is computed beside it: bit by bit, for one device and its dtypes.

    python -m benchmarks.determinism [--device cpu] [--dtype float32 bfloat16] [--blocks 2] [--json]

A span of the reference model computes a session alone, and beside others, as a server does. Equal means that all bits
of its outputs are. The largest difference is relative to the largest output.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers

from benchmarks.common.machine import describe_machine
from benchmarks.common.reference import reference_model
from shoal.host.processes import interruptible
from shoal.model.body import Body
from shoal.model.linear.quantization import Quantization
from shoal.model.loading import load_body
from shoal.model.weights.checkpoint import Checkpoint
from shoal.server.attention_backends.backend_choice import attention_of
from shoal.server.kv.batch import Chunk, Pass
from shoal.server.kv.batched_pass import pass_over
from shoal.server.kv.cache_shapes import cache_shapes
from shoal.server.kv.paged_cache import PagedCache
from shoal.server.kv.pages import pages_for
from shoal.server.kv.session_cache import Growth
from shoal.spans import Span

PAST = 40
MAX_TOKENS = 160


@dataclass(frozen=True)
class Finding:
    """What was compared, whether all bits are equal, and the largest difference."""

    what: str
    is_equal: bool
    difference: float


class Scene:
    """Sessions of a body, each with pages of its own, and a pass over some of them at a time."""

    def __init__(self, body: Body, compute: Pass, *, seed: int = 0) -> None:
        self._body = body
        self._compute = compute
        self._random = torch.Generator().manual_seed(seed)
        self._pages = pages_for(MAX_TOKENS)

    def inputs(self, num_tokens: int) -> torch.Tensor:
        size = self._body.backbone.config.hidden_size
        return torch.randn(1, num_tokens, size, generator=self._random).to(self._body.backbone.dtype)

    def chunk(self, session: int, hidden: torch.Tensor, num_computed: int) -> Chunk:
        """The next tokens of a session. Its pages are cleared when it begins."""
        pages = tuple(range(session * self._pages, (session + 1) * self._pages))
        growth = Growth((), () if num_computed else pages)
        return Chunk(self._body.span, hidden, None, None, num_computed, (pages,), growth)

    def run(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """The outputs of the first chunk."""
        outputs = self._compute(chunks)
        for each in outputs:
            if isinstance(each, Exception):
                raise each
        first = outputs[0]
        assert isinstance(first, torch.Tensor)
        return first.cpu()

    def compare(self) -> Iterator[Finding]:
        """What may stand beside a session's tokens, compared with nothing."""
        pasts = [PAST, PAST, PAST, PAST, PAST + 7, PAST - 9, PAST + 60, 3]
        past_inputs = [self.inputs(past) for past in pasts]
        for session, hidden in enumerate(past_inputs):
            self.run([self.chunk(session, hidden, 0)])
        tokens = [self.inputs(1) for _ in pasts]
        decode = [self.chunk(index, tokens[index], pasts[index]) for index in range(len(pasts))]
        alone = self.run(decode[:1])
        yield _found("the same step twice", alone, self.run(decode[:1]))
        for number in (2, 4):
            yield _found(f"a token beside {number - 1} of sessions as long", alone, self.run(decode[:number]))
        yield _found("a token beside 7 of sessions of other lengths", alone, self.run(decode))
        prompt = self.inputs(100)
        new = self.chunk(len(pasts), prompt, 0)
        yield _found("a token beside a prompt of 100", alone, self.run([decode[0], new]))
        prompt_alone = self.run([new])
        yield _found("a prompt of 100 beside 7 tokens", prompt_alone, self.run([new, *decode[1:]]))
        parts = [
            self.run([self.chunk(len(pasts), prompt[:, part], part.start)]) for part in (slice(0, 64), slice(64, 100))
        ]
        yield _found("a prompt of 100 in two parts", prompt_alone, torch.cat(parts, dim=1))


def _found(what: str, alone: torch.Tensor, beside: torch.Tensor) -> Finding:
    difference = (alone.float() - beside.float()).abs().max() / alone.float().abs().max()
    return Finding(what, torch.equal(alone, beside), float(difference))


def scene_of(body: Body) -> tuple[Scene, str]:
    """A scene of a body, and how its attention is computed."""
    cache = PagedCache(body, cache_shapes(body), 9 * pages_for(MAX_TOKENS))
    attention = attention_of(body, cache)
    return Scene(body, pass_over(body, cache, attention.backend)), attention.described


def findings_of(device: str, dtype: torch.dtype, quantization: Quantization, num_blocks: int) -> dict[str, Any]:
    body = load_body(
        Checkpoint.open(reference_model(num_blocks=2)),
        Span(0, num_blocks),
        dtype=dtype,
        device=torch.device(device),
        quantization=quantization,
    )
    scene, attention = scene_of(body)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": quantization.value,
        "attention": attention,
        "findings": [asdict(each) for each in scene.compare()],
    }


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--quantization", nargs="+", type=Quantization, default=[Quantization.NONE])
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    found = [
        findings_of(arguments.device, getattr(torch, dtype), quantization, arguments.blocks)
        for dtype in arguments.dtype
        for quantization in arguments.quantization
    ]
    if arguments.json:
        print(json.dumps({"machine": describe_machine(), "found": found}, indent=2))
        return
    print(f"{describe_machine()}\n")
    names = [f"{each['dtype']}, {each['quantization']}" for each in found]
    print("| what | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for row in zip(*(each["findings"] for each in found), strict=True):
        cells = ["equal" if each["is_equal"] else f"off by {each['difference']:.1e}" for each in row]
        print(f"| {row[0]['what']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
