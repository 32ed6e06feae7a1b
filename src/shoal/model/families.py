"""Where the blocks of a model are, and which families are certified to be cut into blocks.

Almost everything is read from the model's own class, built on the meta device: which module owns the list of layers,
and the name of that list. The tables below have what cannot be read there. A family that has not passed the parity
suite (`tests/swarm/test_parity.py`) is refused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings

from shoal.errors import UnsupportedModel
from shoal.model.family_tables import CERTIFIED, CERTIFIED_WITH_VISION, uncertified
from shoal.tensors import LOSSY, Encoding

# Families whose layers return a tuple that begins with the hidden states. A placeholder for such a layer does the same.
LAYERS_RETURN_TUPLE = frozenset(
    {"bloom", "codegen", "falcon", "falcon_h1", "gpt_neo", "gpt_neox_japanese", "gptj", "mpt"}
)

# Families that lose their recurrent state when several new tokens come at once. A body gives them one token at a time.
STEP_BY_STEP = frozenset({"falcon_mamba", "jamba", "mamba"})

# Families that can compute tokens of several sequences in one row, because their layers reach a sequence's past only
# through Transformers' attention interface. The other families are computed one session at a time.
PACKED = frozenset(
    """
    afmoe apertus arcee aria_text axk1 beam biogpt bitnet cohere cohere2 cohere2_moe cwm deepseek_v2 deepseek_v3
    dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo flint gemma gemma2 gemma3_text glm glm4 glm4_moe
    glm4_moe_lite gpt2 gpt_bigcode gpt_neox gpt_oss granite granite_swa granitemoe granitemoe_swa
    granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe
    kolibri1 laguna llama mellum mimo_v2_flash minicpm3 minimax_m2 minimax_m3_vl_text ministral ministral3 mistral
    mixtral modernbert-decoder nanochat olmo olmo2 olmo3 olmoe opt persimmon phi phi3 qwen2 qwen2_moe qwen3
    qwen3_moe seed_oss smollm3 solar_open starcoder2 vaultgemma youtu
    """.split()  # noqa: SIM905
)

# Rotary embeddings that depend on the longest sequence of a call. They would let one client change another's results.
ROTARY_BY_LENGTH = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True)
class LengthRegime:
    """A model computes tokens differently from some length on, the same for all sequences of a call.

    `kind` is "switch" if there are two ways, up to `size` tokens and beyond; "each" if every length beyond `size` has
    its own; and "steps" if it changes at every multiple of `size`.
    """

    kind: Literal["switch", "each", "steps"]
    size: int

    def of(self, num_tokens: int) -> int:
        """A number that is equal for lengths that are computed in the same way."""
        if self.kind == "steps":
            return num_tokens // self.size
        if num_tokens <= self.size:
            return 0
        return 1 if self.kind == "switch" else num_tokens


# Certified families in which the errors of an encoding exceed its tolerance, because of recurrent state or because they
# select keys.
TOO_SENSITIVE: Mapping[Encoding, frozenset[str]] = {
    "bfloat16": frozenset({"deepseek_v32", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"}),
    "int8": frozenset(
        {
            *("axk2", "bailing_hybrid", "deepseek_v32", "kimi_linear"),
            *("olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"),
        }
    ),
}


@dataclass(frozen=True)
class Family:
    """How the models of one family are cut into blocks."""

    model_type: str
    backbone: type[PreTrainedModel]
    backbone_path: str  # from the causal language model to its backbone, such as "model.decoder" for OPT
    layers_name: str  # the name of the list of layers in the backbone: "layers", "h", "blocks"
    num_blocks: int
    packable: bool  # whether the tokens of several sequences can be computed in one row
    regimes: tuple[LengthRegime, ...] = ()  # sequences of different regimes are not computed in one batch
    renamings: tuple[WeightRenaming, ...] = field(default=(), compare=False)  # from a checkpoint's names to the model's
    encodings: frozenset[Encoding] = frozenset()  # allowed for its hidden states and gradients, in addition to raw

    @property
    def layers_return_tuple(self) -> bool:
        """Whether a layer returns a tuple that begins with the hidden states."""
        return self.model_type in LAYERS_RETURN_TUPLE

    @property
    def step_by_step(self) -> bool:
        """Whether a call with a cache may have only one new token."""
        return self.model_type in STEP_BY_STEP

    def block_of(self, name: str) -> int | None:
        """The number of the block that a checkpoint's tensor belongs to; None if the tensor belongs to the client.

        The name may lack the model's prefix ("h.0.ln_1.weight"). It may also be from a checkpoint with a vision tower
        ("model.language_model.layers.0...").
        """
        match = self._split(name)
        return None if match is None else match[0]

    def name_in_backbone(self, name: str) -> str | None:
        """The backbone's name for a block's tensor: "model.layers.3.mlp.weight" -> "layers.3.mlp.weight".

        None for a tensor that belongs to the client.
        """
        match = self._split(name)
        return None if match is None else f"{self.layers_name}.{match[0]}.{match[1]}"

    def name_in_head(self, name: str) -> str | None:
        """A language model's name for a client's tensor: "model.language_model.norm.weight" -> "model.norm.weight".

        None for a block's tensor.
        """
        if self._split(name) is not None:
            return None
        return ".".join(part for part in name.split(".") if part != "language_model")

    def _split(self, name: str) -> tuple[int, str] | None:
        pattern = re.compile(rf"(?:(.*?)\.)?{re.escape(self.layers_name)}\.(\d+)\.(.+)")
        in_model = pattern.match(apply_renamings(name, self.renamings))
        if in_model is None:
            return None
        owner = [part for part in (in_model[1] or "").split(".") if part and part != "language_model"]
        path = self.backbone_path.split(".") if self.backbone_path else []
        if path[len(path) - len(owner) :] != owner:
            return None
        # The rest of the name stays as in the checkpoint: Transformers renames it when it loads the tensor.
        in_checkpoint = pattern.match(name) or in_model
        return int(in_model[2]), in_checkpoint[3]


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a config that describes the language model."""
    text = config.get_text_config(decoder=True)
    if text is config:
        return config
    text = copy.copy(text)
    text.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)  # the outer config decides
    return text


def family_of(config: PreTrainedConfig, *, allow_uncertified: bool = False) -> Family:
    """The family of a model.

    Raises `UnsupportedModel` for a family that cannot be cut into blocks, and for one that is not certified unless
    `allow_uncertified`.
    """
    full_config, config = config, text_config(config)
    is_certified = config.model_type in CERTIFIED and (
        full_config is config or full_config.model_type in CERTIFIED_WITH_VISION
    )
    if not is_certified and not allow_uncertified:
        raise uncertified(full_config.model_type)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(f"{config.model_type!r} is not a causal language model")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    path, backbone, layers_name = find_backbone(model, config)
    conversions = get_model_conversion_mapping(model)
    return Family(
        model_type=config.model_type,
        backbone=type(backbone),
        backbone_path=path,
        layers_name=layers_name,
        num_blocks=config.num_hidden_layers,
        packable=config.model_type in PACKED and not ROTARY_BY_LENGTH & {name for name, _ in _rotaries(config)},
        regimes=_regimes(config),
        renamings=tuple(step for step in conversions if isinstance(step, WeightRenaming)),
        encodings=frozenset(LOSSY) if allow_uncertified else certified_encodings(config.model_type),
    )


def _rotaries(config: PreTrainedConfig) -> list[tuple[str, Mapping[str, Any]]]:
    """The types of a model's rotary embeddings with their parameters: one for all layers, or one for each kind."""
    parameters = getattr(config, "rope_parameters", None) or {}
    candidates = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return [(str(candidate["rope_type"]), candidate) for candidate in candidates if "rope_type" in candidate]


def _regimes(config: PreTrainedConfig) -> tuple[LengthRegime, ...]:
    regimes = []
    for name, parameters in _rotaries(config):
        if name == "longrope":
            regimes.append(LengthRegime("switch", parameters["original_max_position_embeddings"]))
        elif name == "dynamic":
            regimes.append(LengthRegime("each", config.max_position_embeddings))
    if getattr(config, "attn_temperature_tuning", False):  # Llama 4 scales queries by the length of the call
        regimes.append(LengthRegime("steps", int(config.floor_scale)))
    return tuple(regimes)


def certified_encodings(model_type: str) -> frozenset[Encoding]:
    """The encodings in which a family's hidden states and gradients stay within the tolerance."""
    return frozenset(encoding for encoding in LOSSY if model_type not in TOO_SENSITIVE[encoding])


def find_backbone(model: PreTrainedModel, config: PreTrainedConfig) -> tuple[str, PreTrainedModel, str]:
    """Find the module that owns a model's list of layers.

    Returns its path in the model, the module itself, and the name of the list. Raises `UnsupportedModel` if there is no
    such list.
    """
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            for name, child in module.named_children():
                if isinstance(child, nn.ModuleList) and len(child) == config.num_hidden_layers:
                    return path, module, name
    raise UnsupportedModel(f"{config.model_type!r} has no list of layers that can be cut into blocks")
