"""Where a model's blocks live, and which families are certified to be cut into them.

Almost everything is read off the model's own class, built on the meta device: which module owns the list of layers, and
under which name. What cannot be seen there is in the one small table below; what has not passed the parity suite
(`tests/swarm/test_parity.py`) is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from shoal.errors import UnsupportedModel

# Families whose layers return a tuple of which the hidden states come first: what the client puts in the layers' place
# must return the same. (The servers look at what a layer really returns and need no table.)
LAYERS_RETURN_TUPLE = frozenset({"bloom"})

# Families that pass every check of the parity suite; docs/models.md says what was checked.
CERTIFIED = frozenset({"bloom", "gpt2", "llama"})


@dataclass(frozen=True)
class Family:
    """How the models of one family are built, as far as cutting them is concerned."""

    model_type: str
    backbone: type[PreTrainedModel]
    backbone_path: str  # of the backbone in the causal language model, "model.decoder" for OPT
    layers_name: str  # of the list of layers in the backbone: "layers", "h", "blocks"
    num_blocks: int

    @property
    def layers_return_tuple(self) -> bool:
        return self.model_type in LAYERS_RETURN_TUPLE

    def block_of(self, name: str) -> int | None:
        """The number of the block that a checkpoint's tensor belongs to; `None` if it is the client's.

        Names may lack the model's prefix ("h.0.ln_1.weight") or come from a checkpoint that holds a vision tower too
        ("model.language_model.layers.0...").
        """
        match = self._split(name)
        return None if match is None else match[0]

    def name_in_backbone(self, name: str) -> str | None:
        """A block's tensor as the backbone calls it: "model.layers.3.mlp.weight" -> "layers.3.mlp.weight"."""
        match = self._split(name)
        return None if match is None else f"{self.layers_name}.{match[0]}.{match[1]}"

    def _split(self, name: str) -> tuple[int, str] | None:
        match = re.match(rf"(?:(.*?)\.)?{re.escape(self.layers_name)}\.(\d+)\.(.+)", name)
        if match is None:
            return None
        owner = [part for part in (match[1] or "").split(".") if part and part != "language_model"]
        path = self.backbone_path.split(".") if self.backbone_path else []
        return (int(match[2]), match[3]) if path[len(path) - len(owner) :] == owner else None


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a config that describes the language model."""
    return config.get_text_config(decoder=True)


def family_of(config: PreTrainedConfig, *, allow_uncertified: bool = False) -> Family:
    """The family of a model.

    Raises `UnsupportedModel` for one that has not been certified, unless asked not to, and for one that cannot be cut.
    """
    config = text_config(config)
    if config.model_type not in CERTIFIED and not allow_uncertified:
        raise UnsupportedModel(
            f"the family {config.model_type!r} is not certified to give the same outputs when it is cut into blocks",
            hint="docs/models.md lists those that are; --allow-uncertified tries anyway",
        )
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config)
        except ValueError as error:
            raise UnsupportedModel(f"{config.model_type!r} is not a causal language model") from error
    path, backbone, layers_name = find_backbone(model, config)
    return Family(config.model_type, type(backbone), path, layers_name, config.num_hidden_layers)


def find_backbone(model: PreTrainedModel, config: PreTrainedConfig) -> tuple[str, PreTrainedModel, str]:
    """The module that owns the list of a model's layers: its path in the model, itself, and the name of the list."""
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            for name, child in module.named_children():
                if isinstance(child, nn.ModuleList) and len(child) == config.num_hidden_layers:
                    return path, module, name
    raise UnsupportedModel(f"{config.model_type!r} keeps its layers in no list that can be cut")
