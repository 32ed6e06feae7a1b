"""A call of `stream` becomes a `Generation`. Transformers' own `generate()` checks and prepares everything.

It calls a decoding method that a caller may pass (`custom_generate`); the one here takes what was prepared, and decodes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from shoal.client.continuation import Continuation
from shoal.client.generation.drafting.drafter import Drafter
from shoal.client.generation.drafting.ngram_drafter import NgramDrafter
from shoal.client.generation.generation import MAX_GUESSES, Generation
from shoal.client.generation.speculating import Speculation
from shoal.client.inference_session import InferenceSession
from shoal.client.options.client_options import AUTO, OFF, parse_draft
from shoal.errors import UnsupportedOperation, UserError
from shoal.model.remote_cache import CACHE_NAMES, RemoteCache

ONE_AFTER_ANOTHER = GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE
"""The ways of decoding that a stream has: one token after another, none taken back."""
MAX_LOGPROBS = 256


@dataclass(frozen=True)
class _Prepared:
    """What `generate()` hands to its decoding method. It has the cache by the name that `generate()` looks for."""

    ids_1S: torch.Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    past_key_values: RemoteCache


def prepared(
    model: Any,
    generate: Callable[..., Any],
    inputs: Any,
    *,
    session: InferenceSession | None,
    seed: int | None,
    num_logprobs: int | None,
    draft: str | Path | PreTrainedModel | Drafter,
    num_guesses: int | None,
    options: Mapping[str, Any],
) -> Generation:
    """A generation that can begin. `generate` is Transformers', of this model.

    Raises `UserError` for options that a stream does not have, and whatever `generate()` raises for wrong ones.
    """
    if num_logprobs is not None and not 0 <= num_logprobs <= MAX_LOGPROBS:
        raise UserError(f"num_logprobs={num_logprobs}", hint=f"0 to {MAX_LOGPROBS}, or None for no log-probabilities")
    options = dict(options)
    continuation = None
    inputs = options.pop("input_ids", None) if inputs is None else inputs
    if session is not None:
        continuation = Continuation.of(session, inputs, options.pop("attention_mask", None))
        inputs = continuation.input_ids
        cache = continuation.cache(session, options)
        options |= {"attention_mask": continuation.attention_mask, "past_key_values": cache}
    found: _Prepared = generate(inputs, custom_generate=_take, **options)
    _check(found)
    own: InferenceSession = found.past_key_values.session  # type: ignore[assignment]
    speculation = _speculation(model, found.ids_1S, draft, num_guesses)
    own.in_call = True
    generator = torch.Generator(found.ids_1S.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return Generation(
        model,
        found.ids_1S,
        own,
        found.processors,
        found.criteria,
        samples=bool(found.config.do_sample),
        generator=generator,
        keeps_session=session is not None,
        finish=_forget if continuation is None else partial(continuation.finish, own),
        num_logprobs=num_logprobs,
        speculation=speculation,
    )


def _speculation(
    model: Any, ids_1S: torch.Tensor, draft: str | Path | PreTrainedModel | Drafter, num_guesses: int | None
) -> Speculation | None:
    """The guesses that the steps of a text carry. A model that cannot go back to an earlier token has none."""
    if num_guesses is not None and not 0 <= num_guesses <= MAX_GUESSES:
        raise UserError(f"num_guesses={num_guesses}", hint=f"0 to {MAX_GUESSES}, or None to let measurements decide")
    drafters: list[Drafter] = [NgramDrafter()]
    if isinstance(draft, Drafter):
        drafters = [draft]
    elif parse_draft(draft) not in (AUTO, OFF):
        drafters.append(model.draft_models.drafter(model, draft))
    if draft == OFF or model._is_stateful:
        return None
    for drafter in drafters:
        drafter.append(ids_1S[0].tolist())
    return Speculation(*drafters, fixed=num_guesses)


def _take(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> _Prepared:
    """A decoding method that decodes nothing. Raises `UserError` for what a stream cannot do."""
    cache = next((model_kwargs[name] for name in CACHE_NAMES if model_kwargs.get(name) is not None), None)
    if model_kwargs.get("inputs_embeds") is not None:
        raise UserError("a stream begins with tokens, not with embeddings", hint="use generate()")
    if not isinstance(cache, RemoteCache):
        raise UserError("a stream needs a cache", hint="use generate() with use_cache=False")
    mask = model_kwargs.get("attention_mask")
    if len(input_ids) == 1 and mask is not None and not bool(mask.all()):
        raise UserError("a stream has one text, which needs no padding", hint="pass the tokens without padding")
    return _Prepared(input_ids, logits_processor, stopping_criteria, generation_config, cache)


def _check(found: _Prepared) -> None:
    """Raises `UserError` or `UnsupportedOperation` for what only `generate()` can do."""
    config = found.config
    if (mode := config.get_generation_mode()) not in ONE_AFTER_ANOTHER:
        raise UnsupportedOperation(f"{mode.value.replace('_', ' ')} cannot be streamed", hint="use generate()")
    if len(found.ids_1S) != 1 or (config.num_return_sequences or 1) != 1:
        raise UserError(
            "a stream has one text", hint="call stream() once for each: they are computed together all the same"
        )
    if any(isinstance(each, UnbatchedClassifierFreeGuidanceLogitsProcessor) for each in found.processors):
        raise UnsupportedOperation("guidance cannot be streamed", hint="use generate()")
    if config.return_dict_in_generate:
        raise UserError("a stream returns tokens only", hint="num_logprobs=5 adds log-probabilities; or use generate()")


def _forget(ids_1S: torch.Tensor) -> None:
    """A session of one generation has nothing to remember."""
