"""Whether a model guesses the same for several texts at once as for each alone. Any model may guess, so it is tried.

What is tried: two made-up texts, one shorter than what is read of the other, and one token more of each. What short
texts do not show is seen in the config: where the frequencies of rotary embeddings follow the longest text of a batch,
each text would depend on its company.
"""

# B texts, S tokens that a pass reads of each, V tokens of the vocabulary

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from shoal.client.generation.drafting.joint_passes import Asked, Pass, guess_together
from shoal.policy.speculation.shared_passes import ModelSize

LONGER, SHORTER, READ = 6, 2, 3
"""The lengths of the two texts, and how many tokens of the first are read before."""
CLOSE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""How far apart logits may be, as a part of their standard deviation, by dtype."""
CLOSE_OTHERWISE = 0.2
"""The same in bfloat16 and float16. What masks or positions get wrong is about as large as the deviation itself."""


def size_if_alike(
    model: Any, *, alone: Pass, together: Pass, num_words: int, max_length: int | None
) -> ModelSize | None:
    """How much passes of a model touch, if `together` gives two texts the logits that `alone` gives each; None if not.

    A model that fails at passes together has none.
    """
    room = LONGER + 2 if max_length is None else max_length
    if num_words < 2 or room < LONGER + 2 or follows_the_longest(model.config):
        return None
    texts = [[(7 * place + 3 * length) % num_words for place in range(length)] for length in (LONGER, SHORTER)]
    own, joint = _Recorded(alone), _Recorded(together)
    for text in texts:
        _two_guesses(own, [_asked(alone, text, model.device)], model.device)
    asked = [_asked(alone, text, model.device) for text in texts]
    try:
        _two_guesses(joint, asked, model.device)
    except Exception:  # code of any model, which may want batches of another form
        return None
    layers = [layer for each in asked for layer in each.cache.layers]
    if not layers or not all(type(layer) is DynamicLayer for layer in layers):
        return None
    first_1, first_2, second_1, second_2 = torch.cat(joint.logits)
    own_BV, joint_BV = torch.cat(own.logits), torch.stack((first_1, second_1, first_2, second_2))
    far = (own_BV - joint_BV).abs().max() / own_BV.std()
    return _size_of(model, asked[0].cache) if far <= CLOSE.get(own_BV.dtype, CLOSE_OTHERWISE) else None


def follows_the_longest(config: PreTrainedConfig) -> bool:
    """Whether rotary embeddings change with the longest text: a shorter one in its company would get other ones."""
    found = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [found, *(each for each in found.values() if isinstance(each, dict))]  # of all layers, or by their type
    return any("dynamic" in (kind := str(each.get("rope_type"))) or kind == "longrope" for each in kinds)


class _Recorded:
    """Passes whose logits are kept, and whose next token is always the same: a tie may fall either way."""

    def __init__(self, one_pass: Pass) -> None:
        self.logits: list[Tensor] = []
        self._one_pass = one_pass

    def __call__(self, ids_BS: Tensor, cache: DynamicCache, *, mask_BL: Tensor, positions_BS: Tensor) -> Tensor:
        logits_BV = self._one_pass(ids_BS, cache, mask_BL=mask_BL, positions_BS=positions_BS)
        self.logits.append(logits_BV)
        return torch.nn.functional.one_hot(torch.ones_like(ids_BS[:, -1]), 2)


@torch.no_grad()
def _asked(alone: Pass, text: Sequence[int], device: torch.device) -> Asked:
    """Two guesses behind a text, of which `READ` tokens are read if there are more."""
    cache, num_read = DynamicCache(), READ if len(text) > READ else 0
    if num_read:
        ids_1S = torch.tensor([text[:num_read]], device=device)
        alone(ids_1S, cache, mask_BL=torch.ones_like(ids_1S), positions_BS=torch.arange(num_read, device=device)[None])
    return Asked(text, num_read, 2, cache)


def _two_guesses(one_pass: Pass, asked: Sequence[Asked], device: torch.device) -> None:
    guess_together(one_pass, asked, device=device, clock=lambda: 0.0)


def _size_of(model: Any, cache: DynamicCache) -> ModelSize:
    """Embeddings of the input are only looked up, unless the output has the same."""
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    weights = sum(each.numel() for each in model.parameters())
    if output is not None and embeddings.weight is not output.weight:
        weights -= embeddings.weight.numel()
    layers = [layer for layer in cache.layers if layer.is_initialized]
    kept = sum(states[0, :, 0].numel() for layer in layers for states in (layer.keys, layer.values))
    return ModelSize(weights, len(layers), kept)
