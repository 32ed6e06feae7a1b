"""Adapters that others have trained: a PEFT folder, on this machine or on the hub, put into a model.

Client and server do it the same way, the one to the model that it uses, the other to a skeleton of it, so that both
find the same factors under the same names: a client does not send what a server hosts. Weights are read from
safetensors only; a folder that has nothing else is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from shoal.errors import CheckpointError, UserError
from shoal.model.families import find_backbone, text_config
from shoal.model.peft.factors import Factors, tuned_block
from shoal.model.peft.skeleton import skeletons
from shoal.model.weights.checkpoint import Checkpoint, find_files, read_json
from shoal.spans import Span

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MOST_CONFIG_BYTES = 1 << 20
PREFIX = "base_model.model."
"""Of the names of weights in a folder: that of the model around the model."""
HOSTED = "hosted"
"""What PEFT calls it."""


@dataclass(frozen=True)
class PeftFolder:
    """An adapter as PEFT saves it. Folders of the same files have the same `name`, wherever their `origin` is."""

    origin: str
    name: str
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]

    @classmethod
    def open(
        cls,
        adapter: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> PeftFolder:
        """Read a local folder or a repository on the hub. Raises `UserError` for what is no adapter."""
        files = find_files(
            adapter, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        for file in (CONFIG, WEIGHTS):
            if file not in files:
                raise CheckpointError(
                    f"{adapter} has no {file}", hint="is it a PEFT adapter, saved with save_pretrained as safetensors?"
                )
        path, weights = files.path(CONFIG), files.path(WEIGHTS)
        if path.stat().st_size > MOST_CONFIG_BYTES:
            raise CheckpointError(f"{adapter}: {CONFIG} is not what PEFT writes")
        digest = hashlib.blake2b(path.read_bytes(), digest_size=8)
        digest.update(weights.read_bytes())
        return cls(str(adapter), digest.hexdigest(), read_json(files, CONFIG), load_file(weights))

    def put_into(self, model: nn.Module) -> list[str]:
        """Add it to a model, active and frozen; returns the names of weights for which the model has no place.

        Raises `UserError` for an adapter of another model.
        """
        from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
        from peft.tuners.tuners_utils import cast_adapter_dtype

        try:
            config = PeftConfig.from_peft_type(**{**self.config, "inference_mode": True})
            inject_adapter_in_model(config, model, adapter_name=HOSTED)
            cast_adapter_dtype(model, HOSTED)
            weights = {name.removeprefix(PREFIX): weight for name, weight in self.weights.items()}
            loaded = set_peft_model_state_dict(model, weights, adapter_name=HOSTED)
        except (ValueError, RuntimeError, TypeError, KeyError) as error:
            raise UserError(f"this adapter does not fit the model: {str(error).splitlines()[0]}") from None
        model.eval()
        return sorted(loaded.unexpected_keys)

    def factors(self, checkpoint: Checkpoint, span: Span) -> list[Factors]:
        """What it adds to the blocks of a span, as clients would send it: in float32, as PEFT computes with it."""
        config = text_config(checkpoint.config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        _, backbone, layers_name = find_backbone(model, config)
        bare = skeletons(list(backbone.get_submodule(layers_name)), torch.empty(0))
        setattr(backbone, layers_name, nn.ModuleList(bare))
        self.put_into(model)
        found = (tuned_block(block, bare[block]) for block in span)
        return [each.factors(hosted=self.name) for each in found if each is not None]
