"""The servers of `benchmarks.audits`: the same texts, in every form and way in which honest servers compute."""

# B texts, T tokens of each, D hidden size

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from shoal.model.linear.quantization import Quantization
from shoal.model.loading import load_body
from shoal.model.weights.checkpoint import Checkpoint
from shoal.net.wire.encodings import as_received
from shoal.policy.audits.likeness import Form
from shoal.server.kv.batch import Chunk
from shoal.server.kv.batched_pass import pass_over
from shoal.server.kv.cache_shapes import cache_shapes
from shoal.server.kv.paged_cache import Int8Pages, PagedCache, Pages
from shoal.server.kv.pages import pages_for
from shoal.server.kv.session_cache import Growth
from shoal.spans import Span
from shoal.tensors import Encoding

NUM_DECODED = 24
"""The last tokens of each text are computed one by one where a way says so."""
NUM_ALONE = 8
Passes = list[list[tuple[int, int, int]]]
"""The passes of a computation. Each has the number of a text, and the start and end of its next tokens."""


@dataclass(frozen=True)
class Kind:
    """How a server computes. Its cache in int8 is not announced. Only `usual` kinds are computed in all ways."""

    name: str
    dtype: torch.dtype
    quantization: Quantization = Quantization.NONE
    cache: type[Pages] = Pages
    usual: bool = True

    @property
    def form(self) -> Form:
        """What it announces."""
        return Form(str(self.dtype).removeprefix("torch."), self.quantization.value)


FLOAT32 = Kind("float32", torch.float32)
BFLOAT16 = Kind("bfloat16", torch.bfloat16)
INT8 = Kind("int8", torch.bfloat16, Quantization.INT8)
NF4 = Kind("nf4", torch.bfloat16, Quantization.NF4)
KINDS = (
    FLOAT32,
    BFLOAT16,
    INT8,
    NF4,
    Kind("int8 in float32", torch.float32, Quantization.INT8, usual=False),
    Kind("nf4 in float32", torch.float32, Quantization.NF4, usual=False),
    Kind("bfloat16, int8 cache", torch.bfloat16, cache=Int8Pages, usual=False),
)


@dataclass(frozen=True)
class Answer:
    """The outputs [B, T, D] that servers of these kinds, one after another, computed in a way, of the first texts."""

    kinds: tuple[Kind, ...]
    way: str
    outputs_BTD: torch.Tensor

    @property
    def num_texts(self) -> int:
        """How many of the texts were computed."""
        return len(self.outputs_BTD)


@dataclass(frozen=True)
class Hop:
    """Some blocks, the inputs as they arrive in each encoding, and what servers answer to them."""

    servers: dict[Kind, SpanServer]
    span: Span
    is_last: bool
    inputs_BTD: dict[Encoding, torch.Tensor]
    answers: dict[Encoding, list[Answer]]

    def answer(self, kind: Kind, way: str) -> torch.Tensor:
        """What a server of this kind answers to exact inputs."""
        return next(each.outputs_BTD for each in self.answers["raw"] if (each.kinds, each.way) == ((kind,), way))


class SpanServer:
    """The blocks of one server, and its cache. Each computation begins with empty sessions, one for each text."""

    def __init__(self, checkpoint: Checkpoint, span: Span, kind: Kind, *, num_texts: int, num_tokens: int) -> None:
        body = load_body(checkpoint, span, dtype=kind.dtype, quantization=kind.quantization)
        self._num_pages = pages_for(num_tokens)
        cache = PagedCache(body, cache_shapes(body), num_texts * self._num_pages, kind=kind.cache)
        self._compute = pass_over(body, cache)
        self._dtype, self._span = kind.dtype, span

    def compute(self, inputs_BTD: torch.Tensor, passes: Passes, *, span: Span | None = None) -> torch.Tensor:
        """The outputs [B, T, D] for all blocks, or those of `span`."""
        inputs_BTD = inputs_BTD.to(self._dtype)
        outputs_BTD = torch.empty_like(inputs_BTD)
        for parts in passes:
            chunks = []
            for text, start, end in parts:
                pages = tuple(range(text * self._num_pages, (text + 1) * self._num_pages))
                growth = Growth((), () if start else pages)
                inputs = inputs_BTD[text : text + 1, start:end]
                chunks.append(Chunk(span or self._span, inputs, None, None, start, (pages,), growth))
            for (text, start, end), output in zip(parts, self._compute(chunks), strict=True):
                if isinstance(output, Exception):
                    raise output
                outputs_BTD[text, start:end] = output[0]
        return outputs_BTD


def alone(num_texts: int, sizes: Sequence[int]) -> Passes:
    """Each text for itself, in chunks of these sizes."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [[(text, end - size, end)] for text in range(num_texts) for size, end in zip(sizes, ends, strict=True)]


def beside(num_texts: int, num_tokens: int) -> Passes:
    """All prompts in one pass, and then one next token of each text at a time. Their prompts differ in length."""
    done = [num_tokens - NUM_DECODED - 3 * text for text in range(num_texts)]
    passes = [[(text, 0, length) for text, length in enumerate(done)]]
    while min(done) < num_tokens:
        passes.append([(text, at, at + 1) for text, at in enumerate(done) if at < num_tokens])
        done = [min(at + 1, num_tokens) for at in done]
    return passes


def uneven(num_tokens: int, rng: random.Random) -> list[int]:
    """Sizes of chunks, at random."""
    sizes: list[int] = []
    while (left := num_tokens - sum(sizes)) > 0:
        sizes.append(min(left, rng.choice([1, 3, 9, 17, 33, 60, 100])))
    return sizes


WHOLE, BESIDE = "whole", "token by token beside others"


def ways(num_texts: int, num_tokens: int, rng: random.Random) -> dict[str, tuple[int, int, Passes]]:
    """By name: the number of threads, how many of the texts are computed, and the passes."""
    last = [num_tokens - NUM_ALONE, *[1] * NUM_ALONE]
    full = [64] * (num_tokens // 64)
    rest = [num_tokens % 64] if num_tokens % 64 else []
    return {
        WHOLE: (1, num_texts, alone(num_texts, [num_tokens])),
        "whole, two threads": (2, 1, alone(1, [num_tokens])),
        "chunks of 64": (1, num_texts, alone(num_texts, [*full, *rest])),
        "uneven chunks": (1, num_texts, alone(num_texts, uneven(num_tokens, rng))),
        BESIDE: (1, num_texts, beside(num_texts, num_tokens)),
        "token by token": (1, 1, alone(1, last)),
    }


FEW_WAYS = ("chunks of 64", "uneven chunks")


class Pipeline:
    """All servers of a model that is cut into hops."""

    def __init__(self, checkpoint: Checkpoint, spans: Sequence[Span], *, num_texts: int, num_tokens: int) -> None:
        self._spans = spans
        self._servers = {
            span: {
                kind: SpanServer(checkpoint, span, kind, num_texts=num_texts, num_tokens=num_tokens) for kind in KINDS
            }
            for span in spans
        }

    def hops(self, embedded_BTD: torch.Tensor, rng: random.Random) -> Iterator[Hop]:
        """What all servers answer for some texts. The inputs of a hop come from a server before it, at random."""
        inputs_BTD = embedded_BTD
        for span in self._spans:
            hop = Hop(self._servers[span], span, span == self._spans[-1], {"raw": inputs_BTD}, {})
            _compute_hop(hop, rng)
            yield hop
            upstream = rng.choice([FLOAT32, BFLOAT16, INT8, NF4])
            inputs_BTD = hop.answer(upstream, BESIDE)


def _compute_hop(hop: Hop, rng: random.Random) -> None:
    """Let all servers of a hop answer."""
    exact_BTD = hop.inputs_BTD["raw"]
    num_texts, num_tokens = exact_BTD.shape[:2]
    of_exact = hop.answers["raw"] = []
    every_way = ways(num_texts, num_tokens, rng)
    for kind, server in hop.servers.items():
        for name, (num_threads, num_computed, passes) in every_way.items():
            if kind.usual or name in FEW_WAYS:
                torch.set_num_threads(num_threads)
                outputs_BTD = server.compute(exact_BTD[:num_computed], passes)
                of_exact.append(Answer((kind,), name, outputs_BTD))
    torch.set_num_threads(1)
    usual = [kind for kind in hop.servers if kind.usual]
    for _ in range(3):
        of_exact.append(_in_two_hops(hop, rng.sample(usual, 2), "raw"))
    for encoding in ("bfloat16", "int8"):
        hop.inputs_BTD[encoding] = as_received(exact_BTD, encoding)
        hop.answers[encoding] = [
            Answer((kind,), name, hop.servers[kind].compute(hop.inputs_BTD[encoding], every_way[name][2]))
            for kind in usual
            for name in FEW_WAYS
            if encoding == "int8" or kind is FLOAT32
        ]
        if encoding == "bfloat16":  # what a server in bfloat16 computes with is the same
            of_bfloat16 = [each for each in of_exact if each.kinds[0].dtype == torch.bfloat16 and len(each.kinds) == 1]
            hop.answers[encoding] += of_bfloat16
        hop.answers[encoding] += [_in_two_hops(hop, [kind, kind], encoding) for kind in rng.sample(usual, 2)]


def _in_two_hops(hop: Hop, kinds: Sequence[Kind], encoding: Encoding) -> Answer:
    """Two servers of these kinds, each with a half of the blocks, and hidden states that travel in an encoding."""
    middle = (hop.span.start + hop.span.end) // 2
    hidden_BTD = hop.inputs_BTD[encoding]
    num_texts, num_tokens = hidden_BTD.shape[:2]
    for kind, span in zip(kinds, (Span(hop.span.start, middle), Span(middle, hop.span.end)), strict=True):
        passes = alone(num_texts, [num_tokens])
        hidden_BTD = hop.servers[kind].compute(as_received(hidden_BTD, encoding), passes, span=span)
    return Answer(tuple(kinds), "whole, in two hops", hidden_BTD)
