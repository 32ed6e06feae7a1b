"""Trained adapters in PEFT's folder format, from this machine or from the hub.

The client puts such an adapter into its model, and a server puts it into a skeleton of the model. Both find the same
factors with the same names, so that a client does not send an adapter that the server hosts. Weights are read only from
safetensors files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from shoal.errors import CheckpointError, UserError
from shoal.model.families import find_backbone, text_config
from shoal.model.peft.factors import AdapterFactors
from shoal.model.peft.peft_config import checked_fields
from shoal.model.peft.peft_layers import find_adapter
from shoal.model.peft.skeleton import skeletons
from shoal.model.weights.checkpoint import Checkpoint
from shoal.model.weights.contents import find_files, read_json
from shoal.spans import Span

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
"""The largest config that is read. Those that PEFT writes have a few kilobytes."""
MAX_WEIGHTS_BYTES = 8 << 30
"""The largest file of weights that is read: a rank of 64 on all linear layers of a model of 70 B, in float32."""
MAX_WEIGHTS = 200_000
"""The tensors in it. The factors of 126 blocks with 256 experts, of which each is adapted, are fewer."""
ROUNDING = 2**-7
"""By how much weights may differ that were trained beside in bfloat16."""
PREFIX = "base_model.model."
"""The prefix of weights in a PEFT folder, from the `PeftModel` around the model."""
HOSTED = "hosted"
"""The adapter's name in PEFT's layers."""


@dataclass(frozen=True)
class PeftFolder:
    """An adapter as PEFT saves it. `name` is a digest of its files; `origin` is the folder or the id on the hub."""

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
        """Read a local folder or a repository on the hub. Raises `UserError` if it is not a PEFT adapter."""
        files = find_files(
            adapter, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        for file in (CONFIG, WEIGHTS):
            if file not in files:
                raise CheckpointError(
                    f"{adapter} has no {file}", hint="is it a PEFT adapter, saved with save_pretrained as safetensors?"
                )
        path, weights = files.path(CONFIG), files.path(WEIGHTS)
        for each, most in ((path, MAX_CONFIG_BYTES), (weights, MAX_WEIGHTS_BYTES)):
            if each.stat().st_size > most:
                raise CheckpointError(f"{adapter}: {each.name} is too large to be that of a PEFT adapter")
        digest = hashlib.blake2b(path.read_bytes(), digest_size=8)
        digest.update(weights.read_bytes())
        config = read_json(files, CONFIG)
        checked_fields(str(adapter), config)
        return cls(str(adapter), digest.hexdigest(), config, _weights_in(weights))

    def put_into(self, model: nn.Module) -> list[str]:
        """Add the adapter to a model, active and frozen. Returns the names of weights that have no place in the model.

        Raises `UserError` if the adapter does not fit the model.
        """
        from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
        from peft.tuners.tuners_utils import cast_adapter_dtype

        # The model may be trained on, so it gets copies. What the config asks for is made without memory, and has to
        # come from the file.
        weights = {name.removeprefix(PREFIX): weight.clone() for name, weight in self.weights.items()}
        try:
            config = PeftConfig.from_peft_type(**checked_fields(self.origin, self.config))
            inject_adapter_in_model(config, model, adapter_name=HOSTED, low_cpu_mem_usage=True)
            weights = self._without_own(weights, model)
            loaded = set_peft_model_state_dict(model, weights, adapter_name=HOSTED, low_cpu_mem_usage=True)
            cast_adapter_dtype(model, HOSTED)
        except (ValueError, RuntimeError, TypeError, KeyError, NotImplementedError) as error:
            raise UserError(f"this adapter does not fit the model: {str(error).splitlines()[0]}") from None
        factors = [name for name in loaded.missing_keys if name.endswith(f".{HOSTED}.weight") or ".ia3_l." in name]
        if missing := sorted(name for name in factors if model.get_parameter(name).is_meta):
            name = missing[0].replace(f".{HOSTED}", "")
            raise UserError(f"the adapter {self.origin} lacks {len(missing)} of its weights, such as {name}")
        model.eval()
        return sorted(loaded.unexpected_keys)

    def _without_own(self, weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The weights but those of the model itself, which PEFT saves beside adapters of embeddings.

        Raises `UserError` if one of them is another: the model may be shared, and is not changed.
        """
        known = {name: own for name, own in model.named_parameters() if HOSTED not in name.split(".")}
        for name in sorted(weights.keys() & known.keys()):
            own, given = known[name].detach().float(), weights[name].to(known[name].device).float()
            if own.is_meta:  # on a server, which takes the factors of its blocks only
                continue
            slack = ROUNDING * float(own.abs().mean())
            if given.shape != own.shape or not torch.allclose(given, own, rtol=ROUNDING, atol=slack):
                raise UserError(
                    f"the adapter {self.origin} has other values for the model's own {name}",
                    hint="train such layers with modules_to_save= or with LoRA",
                )
        return {name: weight for name, weight in weights.items() if name not in known}

    def factors(self, checkpoint: Checkpoint, span: Span) -> list[AdapterFactors]:
        """The adapters of the blocks of a span, as a client would send them: in float32, as in PEFT."""
        config = text_config(checkpoint.config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        _, backbone, layers_name = find_backbone(model, config)
        layers = skeletons(list(backbone.get_submodule(layers_name)), torch.empty(0))
        setattr(backbone, layers_name, nn.ModuleList(layers))
        self.put_into(model)
        found = (find_adapter(block, layers[block]) for block in span)
        return [each.factors(hosted=self.name) for each in found if each is not None]


def _weights_in(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights. Raises `CheckpointError` for a damaged file, and for what are no factors."""
    try:
        with safe_open(file, framework="pt") as opened:
            num = len(list(opened.keys()))
        weights = load_file(file) if num <= MAX_WEIGHTS else {}
    except SafetensorError as error:
        raise CheckpointError(f"{file.name} of the adapter is damaged: {str(error).splitlines()[0][:200]}") from None
    if num > MAX_WEIGHTS:
        raise CheckpointError(f"{file.name} has {num:,} tensors: more than a PEFT adapter has")
    if strange := next((name for name, weight in weights.items() if not weight.is_floating_point()), None):
        raise CheckpointError(
            f"{file.name} of the adapter: {strange[:100]} holds no factors but {weights[strange].dtype}"
        )
    return weights
