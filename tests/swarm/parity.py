"""What it takes to be certified: a model that is cut, and put together again, gives what the whole model gives."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from shoal.errors import UnsupportedOperation
from shoal.model.body import build_body
from shoal.model.families import family_of
from shoal.model.head import build_head
from shoal.model.remote_cache import RemoteCache
from shoal.spans import Span
from shoal.tensors import Encoding

from .local_blocks import LocalBlocks, NoBlocks
from .tiny_models import VOCABULARY, tiny_config, tiny_model

PROMPT = torch.arange(3, 3 + 14).reshape(2, 7) * 5 % VOCABULARY


class Pair:
    """A whole model, which is the oracle, and the same model in three bodies and a head, from the same checkpoint.

    The hops are uneven, and the first two use a part of what their body holds.
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

        hops = [(Span(0, 2), Span(0, 1)), (Span(0, 4), Span(1, 3)), (Span(3, 5), Span(3, 5))]
        self.blocks = LocalBlocks([(body(held), used) for held, used in hops])
        heads = {name: checkpoint[name] for name, block in of_block.items() if block is None}
        self.cut = build_head(type(self.whole), self.family, self.config, heads, blocks=self.blocks, dtype=dtype)

    def new_cache(self) -> RemoteCache:
        return RemoteCache(self.blocks.new_session(batch_size=2, max_length=64))


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of float32."""
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
        "the blocks of this tiny model do too little to be seen"
    )


def cache_name(model: PreTrainedModel) -> str:
    return "cache_params" if "Mamba" in type(model).__name__ else "past_key_values"


@torch.no_grad()
def check_cached(pair: Pair) -> None:
    """Two sessions take their steps in turn, and each is as if its tokens had come at once.

    So nothing of a session may stay in a module; and a session that is rebuilt in one pass is the session that was
    lost. (Not every family is like that in plain Transformers.)
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
    """A prompt that comes in two parts, the second of several tokens: as if it had come at once."""
    cache = {cache_name(pair.cut): pair.new_cache()}
    logits = [pair.cut(part, use_cache=True, **cache).logits for part in PROMPT.split([4, 3], dim=1)]
    assert_equal(torch.cat(logits, dim=1), pair.whole(PROMPT).logits)


def check_gradients(pair: Pair) -> None:
    (_, actual), (_, expected) = (logits_and_gradient(pair, model, PROMPT) for model in (pair.cut, pair.whole))
    assert_equal(actual, expected)


def logits_and_gradient(pair: Pair, model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of these tokens, and the gradient of some function of them at the embeddings."""
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
    """Greedy generation from prompts of 7 and 4 tokens: the same tokens, and the same logits at every step."""
    prompt, mask = PROMPT.clone(), torch.ones_like(PROMPT)
    prompt[1, :3], mask[1, :3] = 0, 0
    expected = generate(pair.whole, inputs=prompt, attention_mask=mask, output_logits=True)
    actual = generate(pair.cut, inputs=prompt, attention_mask=mask, output_logits=True)
    assert torch.equal(actual.sequences, expected.sequences)
    assert_equal(torch.stack(actual.logits), torch.stack(expected.logits))


def check_beams(pair: Pair) -> None:
    expected = generate(pair.whole, inputs=PROMPT, num_beams=3, output_scores=True)
    actual = generate(pair.cut, inputs=PROMPT, num_beams=3, output_scores=True)
    assert torch.equal(actual.sequences, expected.sequences)
    assert_equal(actual.sequences_scores, expected.sequences_scores)


@torch.no_grad()
def check_rewind(pair: Pair) -> bool:
    """Whether a session can go back; if it says so, what follows must be as if it had never gone further."""
    name = cache_name(pair.cut)
    cache = pair.new_cache()
    pair.cut(PROMPT, **{name: cache})
    try:
        cache.crop(-2)
    except UnsupportedOperation:
        return False
    logits = pair.cut(PROMPT[:, 5:], **{name: cache}).logits
    assert_equal(logits, pair.whole(PROMPT).logits[:, 5:])
    return True


LONGER = torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))

ROUNDING: dict[Encoding, float] = {"bfloat16": 1 / 256, "int8": 2.5 / 254}
"""How far one journey may move a hidden state, of its length.

bfloat16 moves a number by at most 1/256 of itself. int8 moves it by at most half of one of 127 steps to the peak of its
block, and the peak of a block is some two and a half times its root mean square. Three hops are four journeys, in
which the errors may all add up, but not grow: the tolerance of the logits is four times this. A gradient makes four
more on its way back.

It is the median over the tokens that has to keep to it. A router whose two best experts are nearly equal may choose the
other one for a token, after this rounding as after any other, and such a model is not moved a little but seldom.
"""


def check_encoding(pair: Pair, encoding: Encoding) -> None:
    """Hidden states and gradients that travel in an encoding move the results by no more than its tolerance."""
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
    "beams": check_beams,
    "gradients": check_gradients,
}
