"""The config of a PEFT folder: which of PEFT's fields count here, and what each of them may say.

A folder comes from another person, often from the hub. PEFT itself takes any value: a rank of 1e8 asks for 77 GB, and
a pattern with repetitions in repetitions keeps a processor busy for ever. So every field that counts is listed with its
bounds, fields that change nothing are left out, and all others have to be unset.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from shoal.adapters import MAX_RANK
from shoal.errors import UserError
from shoal.strict import Strict

MAX_TARGETS = 1024
"""The names of one list, and the patterns of one table. An adapter of a mixture of experts names some dozens."""
MAX_LAYERS = 4096
MAX_ALPHA = 1e6
MAX_REPETITIONS = 5
"""The repetitions in one pattern: the steps of a match grow with the length of a name to this power."""
MAX_TRAINED_TOKENS = 1 << 16

IGNORED = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "init_ia3_weights",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
"""Fields that change nothing here: the weights are in the folder, and the model is known already."""


def _tame(pattern: str) -> str:
    """A pattern whose match takes few steps. Raises `ValueError` for all others."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        raise ValueError("not a regular expression") from None
    unescaped = re.sub(r"\\.", "x", pattern)
    if re.search(r"\)[*+{]", unescaped) or len(re.findall(r"[*+{]", unescaped)) > MAX_REPETITIONS:
        raise ValueError(f"a pattern with more than {MAX_REPETITIONS} repetitions, or with one of a group")
    return pattern


Name = Annotated[str, Field(min_length=1, max_length=256)]
Pattern = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_tame)]
Targets = Annotated[list[Name], Field(max_length=MAX_TARGETS)] | Pattern
Ranks = Annotated[dict[Pattern, Annotated[int, Field(ge=1, le=MAX_RANK)]], Field(max_length=MAX_TARGETS)]
Alpha = Annotated[float, Field(ge=-MAX_ALPHA, le=MAX_ALPHA, strict=False)]  # PEFT writes whole numbers too
Alphas = Annotated[dict[Pattern, Alpha], Field(max_length=MAX_TARGETS)]
Block = Annotated[int, Field(ge=0, lt=MAX_LAYERS)]
Blocks = Annotated[list[Block], Field(max_length=MAX_LAYERS)] | Block
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_TRAINED_TOKENS)]


class LoraFields(Strict):
    """What the config of a LoRA says: rsLoRA and DoRA are LoRA too."""

    peft_type: Literal["LORA"]
    r: Annotated[int, Field(ge=1, le=MAX_RANK)] = 8
    lora_alpha: Alpha = 8.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1, strict=False)] = 0.0
    lora_bias: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | Literal["gaussian", "orthogonal", "eva"] = True  # others change the model's weights
    target_modules: Targets | None = None
    exclude_modules: Targets | None = None
    rank_pattern: Ranks = Field(default_factory=dict)
    alpha_pattern: Alphas = Field(default_factory=dict)
    layers_to_transform: Blocks | None = None
    layers_pattern: Annotated[list[Pattern], Field(max_length=MAX_TARGETS)] | Pattern | None = None
    modules_to_save: Annotated[list[Name], Field(max_length=MAX_TARGETS)] | None = None
    trainable_token_indices: Tokens | Annotated[dict[Name, Tokens], Field(max_length=4)] | None = None
    ensure_weight_tying: bool = False


class IA3Fields(Strict):
    """What the config of an IA3 says."""

    peft_type: Literal["IA3"]
    fan_in_fan_out: bool = False
    target_modules: Targets | None = None
    exclude_modules: Targets | None = None
    feedforward_modules: Targets | None = None
    modules_to_save: Annotated[list[Name], Field(max_length=MAX_TARGETS)] | None = None


_FIELDS: TypeAdapter[LoraFields | IA3Fields] = TypeAdapter(
    Annotated[LoraFields | IA3Fields, Field(discriminator="peft_type")]
)


def checked_fields(origin: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments for PEFT's config of an adapter that is at `origin`. Raises `UserError` for any other config."""
    kind = config.get("peft_type")
    if kind not in ("LORA", "IA3"):
        raise UserError(
            f"the adapter {origin} is of another kind: {str(kind)[:40]!r}", hint="LoRA, DoRA and IA3 can be used"
        )
    known = {*(LoraFields if kind == "LORA" else IA3Fields).model_fields}
    own = {name: value for name, value in config.items() if name in known}
    for name, value in config.items():
        if name not in own and name not in IGNORED and value not in (None, False, {}, [], ""):
            raise UserError(
                f"the adapter {origin} sets {name[:40]!r}, which cannot be used here",
                hint="LoRA, DoRA and IA3 with PEFT's usual fields can be used",
            )
    try:
        fields = _FIELDS.validate_python(own)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = next((str(part) for part in first["loc"] if part in known), "its config")
        message = f"the adapter {origin} has a wrong {field}: {first['msg']}"
        raise UserError(message, hint=f"{field} cannot be used in this form") from None
    arguments = fields.model_dump(exclude_unset=True, exclude={"init_lora_weights"})
    return {**arguments, "inference_mode": True}
