"""Calls of Transformers' assisted generation that become streams with guesses.

Transformers has a loop of its own for `assistant_model=`, `prompt_lookup_num_tokens=` and `use_mtp=`. It has one text,
and waits for each round. A stream does the same for many texts, and measures how many guesses are worth it. It gives
the same tokens greedily; sampled ones have the same distribution.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from shoal.client.generation.drafting.draft_models import is_distributed
from shoal.client.generation.preparing import ONE_AFTER_ANOTHER
from shoal.client.options.client_options import AUTO, MTP
from shoal.errors import UserError
from shoal.model.remote_cache import CACHE_NAMES

GUESSING = "assistant_model", "prompt_lookup_num_tokens", "use_mtp"
"""The options of `generate()` with which tokens are guessed."""
OF_THE_LOOP = (
    *("assistant_tokenizer", "custom_generate", "guidance_scale", "inputs_embeds", "synced_gpus", *CACHE_NAMES),
    *("return_dict_in_generate", "prompt_lookup_num_tokens"),
)
"""Options that only Transformers' loop has, or that make it return more than a tensor."""


def as_stream(model: Any, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The options of a call of `generate()` with which a stream does the same, with a `draft`; None if none does."""
    ways = {name: options[name] for name in GUESSING if options.get(name)}
    if len(ways) != 1 or model._is_stateful or options.get("use_cache") is False:
        return None
    others = {name: value for name, value in options.items() if name not in GUESSING}
    config = copy.deepcopy(options.get("generation_config") or model.generation_config)
    config.update(**others)
    given = [others.get(name, getattr(config, name, None)) for name in OF_THE_LOOP]
    if any(value is not None and value is not False for value in given) or (config.num_return_sequences or 1) != 1:
        return None
    if config.use_cache is False or config.get_generation_mode() not in ONE_AFTER_ANOTHER:
        return None
    if "assistant_model" in ways:
        return _with_draft(model, ways["assistant_model"], others)
    return others | {"draft": MTP if "use_mtp" in ways else AUTO}


def _with_draft(model: Any, assistant: Any, options: dict[str, Any]) -> dict[str, Any] | None:
    """With the assistant as a draft, if it is a whole model with the same tokens that can take back some."""
    if not isinstance(assistant, PreTrainedModel) or is_distributed(assistant) or assistant._is_stateful:
        return None
    try:
        model.draft_models.check_config(assistant.config, "the assistant")
    except UserError:
        return None
    return options | {"draft": assistant}
