"""The checks of certification: a model that is cut into spans gives the results of the whole model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from shoal.client.generation.model_ends import ModelEnds
from shoal.errors import UnsupportedOperation
from shoal.model.body import build_body, joined_body
from shoal.model.families import family_of
from shoal.model.head import build_head
from shoal.model.remote_cache import RemoteCache
from shoal.spans import Span
from shoal.tensors import Encoding

from .local_blocks import LocalBlocks, NoBlocks
from .tiny_models import VOCABULARY, tiny_config, tiny_model

PROMPT = torch.arange(3, 3 + 14).reshape(2, 7) * 5 % VOCABULARY


class Pair:
    """A whole model as the oracle, and the same model in three bodies and a head, from one checkpoint.

    The hops have different lengths, and the first two use only a part of their body's blocks. The second body is joined
    from two others.
    """

    def __init__(self, model_type: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> None:
        self.config = tiny_config(model_type, **changes)
        with tempfile.TemporaryDirectory() as folder:
            model = tiny_model(self.config)
            model.save_pretrained(folder)
            self.whole = type(model).from_pretrained(folder, dtype=dtype)
            files = sorted(Path(folder).glob("*.safetensors"))
            checkpoint = {name: tensor for file in files for name, tensor in load_file(file).items()}
        self.family = family_of(self.config, allow_uncertified=True)
        of_block = {name: self.family.block_of(name) for name in checkpoint}

        def body(span: Span) -> Any:
            tensors = {
                name: checkpoint[name] for name, block in of_block.items() if block is not None and block in span
            }
            return build_body(self.family, self.config, span, tensors, dtype=dtype)

        joined = joined_body([body(Span(0, 2)), body(Span(2, 4))], Span(1, 4))
        hops = [(body(Span(0, 2)), Span(0, 1)), (joined, Span(1, 3)), (body(Span(3, 5)), Span(3, 5))]
        self.blocks = LocalBlocks(hops)
        heads = {name: checkpoint[name] for name, block in of_block.items() if block is None}
        self.cut = build_head(type(self.whole), self.family, self.config, heads, blocks=self.blocks, dtype=dtype)

    def new_cache(self) -> RemoteCache:
        return RemoteCache(self.blocks.new_session(batch_size=2, max_length=64))


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Check that two tensors are equal up to the rounding of float32."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * scale)


@torch.no_grad()
def check_logits(pair: Pair) -> None:
    expected = pair.whole(PROMPT).logits
    assert_equal(pair.cut(PROMPT).logits, expected)
    pair.cut.attach_blocks(NoBlocks())
    without = pair.cut(PROMPT).logits
    pair.cut.attach_blocks(pair.blocks)
    assert (without - expected).norm() > 0.05 * expected.norm(), (
        "the blocks of this tiny model change the logits too little to be noticed"
    )


def cache_name(model: PreTrainedModel) -> str:
    return "cache_params" if "Mamba" in type(model).__name__ else "past_key_values"


@torch.no_grad()
def check_cached(pair: Pair) -> None:
    """Check that two sessions with alternating steps give the same logits as a single pass for each.

    So modules must not keep state of a session, and a session that is rebuilt in one pass is equal to the lost one. (In
    plain Transformers this is not true of every family.)
    """
    sessions = [(tokens, {cache_name(pair.cut): pair.new_cache()}) for tokens in (PROMPT, PROMPT.flip(1))]
    steps = [
        [pair.cut(tokens[:, start:end], use_cache=True, **cache).logits for tokens, cache in sessions]
        for start, end in [(0, 4), (4, 5), (5, 6), (6, 7)]
    ]
    for logits, (tokens, _) in zip(zip(*steps, strict=True), sessions, strict=True):
        assert_equal(torch.cat(logits, dim=1), pair.whole(tokens).logits)


@torch.no_grad()
def check_chunks(pair: Pair) -> None:
    """Check that a prompt in two parts, the second of several tokens, gives the same logits as in one pass."""
    cache = {cache_name(pair.cut): pair.new_cache()}
    logits = [pair.cut(part, use_cache=True, **cache).logits for part in PROMPT.split([4, 3], dim=1)]
    assert_equal(torch.cat(logits, dim=1), pair.whole(PROMPT).logits)


def check_gradients(pair: Pair) -> None:
    (_, actual), (_, expected) = (logits_and_gradient(pair, model, PROMPT) for model in (pair.cut, pair.whole))
    assert_equal(actual, expected)


def logits_and_gradient(pair: Pair, model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of these tokens, and the gradient of a function of them with respect to the embeddings."""
    embeds = pair.whole.get_input_embeddings()(tokens).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, use_cache=False).logits
    weights = torch.linspace(-1, 1, logits.numel()).reshape(logits.shape)
    (logits * weights).sum().backward()
    assert embeds.grad is not None
    return logits.detach(), embeds.grad


def generate(model: PreTrainedModel, **options: Any) -> Any:
    return model.generate(
        max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0, return_dict_in_generate=True, **options
    )


def check_padded(pair: Pair) -> None:
    """Check greedy generation from prompts of 7 and 4 tokens: equal tokens, and equal logits at every step."""
    prompt, mask = PROMPT.clone(), torch.ones_like(PROMPT)
    prompt[1, :3], mask[1, :3] = 0, 0
    expected = generate(pair.whole, inputs=prompt, attention_mask=mask, output_logits=True)
    actual = generate(pair.cut, inputs=prompt, attention_mask=mask, output_logits=True)
    assert torch.equal(actual.sequences, expected.sequences)
    assert_equal(torch.stack(actual.logits), torch.stack(expected.logits))


def check_streams(pair: Pair) -> None:
    """Check texts of two lengths, with the embeddings of both in one call and the head in another, as streams have it.

    The logits at every step, also at one with two guesses, are those of generating each alone.
    """
    ends = ModelEnds(pair.cut)
    prompts = [PROMPT[:1], PROMPT[1:, :4]]
    sessions = [pair.blocks.new_session(batch_size=1, max_length=64) for _ in prompts]
    expected = [generate(pair.whole, inputs=prompt, output_logits=True) for prompt in prompts]
    num_known = 0
    for num_more in (1, 1, 3):
        lengths = [prompt.shape[1] + num_known + num_more - 1 for prompt in prompts]
        texts = [
            (each.sequences[:, :length], session.num_tokens)
            for each, session, length in zip(expected, sessions, lengths, strict=True)
        ]
        answers = [
            pair.blocks(
                sent.hidden_1TD,
                attention_mask=None,
                position_ids=sent.positions_1T,
                past_key_values=RemoteCache(session),
            )
            for session, sent in zip(sessions, ends.embed(pair.cut, texts), strict=True)
        ]
        for each, logits_NV in zip(expected, ends.logits(pair.cut, [(one, num_more) for one in answers]), strict=True):
            assert_equal(logits_NV, torch.cat(each.logits[num_known : num_known + num_more]))
        num_known += num_more


def check_beams(pair: Pair) -> None:
    expected = generate(pair.whole, inputs=PROMPT, num_beams=3, output_scores=True)
    actual = generate(pair.cut, inputs=PROMPT, num_beams=3, output_scores=True)
    assert torch.equal(actual.sequences, expected.sequences)
    assert_equal(actual.sequences_scores, expected.sequences_scores)


@torch.no_grad()
def check_rewind(pair: Pair) -> None:
    """Check that after rewinding, where Transformers' caches can, the logits are those of the shorter session."""
    name = cache_name(pair.cut)
    cache = pair.new_cache()
    pair.cut(PROMPT, **{name: cache})
    try:
        cache.crop(-2)
    except UnsupportedOperation:
        return
    logits = pair.cut(PROMPT[:, 5:], **{name: cache}).logits
    assert_equal(logits, pair.whole(PROMPT).logits[:, 5:])


LONGER = torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))

ROUNDING: dict[Encoding, float] = {"bfloat16": 1 / 256, "int8": 2.5 / 254}
"""The relative error that sending a hidden state once may cause.

bfloat16 changes a number by at most 1/256 of itself. int8 changes it by at most half of one of 127 steps to the peak of
its block, and the peak of a block is about two and a half times its root mean square. With three hops, hidden states
are sent four times. The errors may add up but not grow, so the tolerance of the logits is four times this value. A
gradient is sent four more times.

The median over the tokens must be within the tolerance. A router whose two best experts are nearly equal may choose the
other one for a token after any rounding, which rarely happens but changes that token a lot.
"""


def check_encoding(pair: Pair, encoding: Encoding) -> None:
    """Check that an encoding of hidden states and gradients changes the results by no more than its tolerance."""
    expected = logits_and_gradient(pair, pair.whole, LONGER)
    pair.blocks.encoding = encoding
    actual = logits_and_gradient(pair, pair.cut, LONGER)
    pair.blocks.encoding = "raw"
    logits, gradient = (((a - e).norm(dim=-1) / e.norm(dim=-1)).median() for a, e in zip(actual, expected, strict=True))
    assert logits <= 4 * ROUNDING[encoding], f"{encoding} moves the logits by {logits:.1%}"
    assert gradient <= 8 * ROUNDING[encoding], f"{encoding} moves the gradient by {gradient:.1%}"


CHECKS = {
    "logits": check_logits,
    "cached": check_cached,
    "chunks": check_chunks,
    "padded": check_padded,
    "streams": check_streams,
    "beams": check_beams,
    "gradients": check_gradients,
}
