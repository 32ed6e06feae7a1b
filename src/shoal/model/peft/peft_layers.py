"""What PEFT has added to a client's model: its layers in a block's skeleton, described as messages have them."""

# P tokens of a prompt, D hidden size

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shoal.adapters import IA3, Lora, Prompt
from shoal.errors import UnsupportedOperation
from shoal.model.peft.factors import AdapterFactors, FactorGradients, Layer, factors_name


@dataclass(frozen=True)
class ClientAdapter:
    """The adapter of one block on the client: its layers, and the client's parameters in the order of the factors."""

    block: int
    layers: tuple[Layer, ...]
    parameters: tuple[Tensor, ...]

    def factors(self, *, hosted: str | None = None) -> AdapterFactors:
        """The present values of the parameters."""
        dtypes = {parameter.dtype for parameter in self.parameters}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        values = torch.cat([parameter.detach().to("cpu", dtype).flatten() for parameter in self.parameters])
        name, origin = factors_name(self.block, self.layers, values), id(self.parameters[0])
        return AdapterFactors(name, self.block, self.layers, values, origin=origin, hosted=hosted)

    def gradients(self, found: FactorGradients) -> list[Tensor | None]:
        """The gradient of each parameter; None for a parameter that the computation did not use."""
        parts = found.values.split([parameter.numel() for parameter in self.parameters])
        return [
            None if index in found.unused else part.view(own.shape).to(own)
            for index, (part, own) in enumerate(zip(parts, self.parameters, strict=True))
        ]


def check_peft_configs(configs: Mapping[str, Any]) -> None:
    """Raise `UnsupportedOperation` if PEFT was told to add to parameters of blocks, which skeletons do not have."""
    for config in configs.values():
        if parameters := ", ".join(sorted(getattr(config, "target_parameters", None) or ())):
            raise UnsupportedOperation(
                f"servers add adapters to linear layers, not to parameters such as those of experts: {parameters}",
                hint=f"name the linear layers: target_modules={sorted(config.target_modules or ())}",
            )


def find_adapter(block: int, skeleton: nn.Module, prompt_PD: Tensor | None = None) -> ClientAdapter | None:
    """The active adapter of a block: PEFT's layers in its skeleton, and the prompt. None if nothing is active.

    Raises `UnsupportedOperation` for kinds of layers that servers do not compute.
    """
    layers: list[Layer] = []
    parameters: list[Tensor] = []
    for path, module in skeleton.named_modules():
        layer = _described(path, module)
        if layer is not None:
            layers.append(layer)
            parameters += _parameters(module, _active_name(module))
    if prompt_PD is not None:
        layers.append(Prompt(num_tokens=prompt_PD.shape[0]))
        parameters.append(prompt_PD)
    return ClientAdapter(block, tuple(layers), tuple(parameters)) if layers else None


def unset_magnitudes(skeleton: nn.Module, *, loaded: Collection[str] = ()) -> dict[str, Tensor]:
    """The DoRA magnitudes of new layers, which are still 0, by the paths of the layers.

    They must be set to the row norms of the weights. The adapters named in `loaded` are skipped, because their
    magnitudes are about to be read from a file. Raises `UnsupportedOperation` if the norms would depend on more than
    the weights.
    """
    found: dict[str, Tensor] = {}
    for path, module in skeleton.named_modules():
        for name, magnitudes in getattr(module, "lora_magnitude_vector", {}).items():
            if name not in loaded and not magnitudes.weight.is_meta and not magnitudes.weight.any():
                if module.lora_B[name].weight.any():
                    raise UnsupportedOperation(
                        f"{path}: DoRA whose B is not zero at first", hint="leave init_lora_weights at its default"
                    )
                found[path] = magnitudes.weight
    return found


def _described(path: str, module: nn.Module) -> Layer | None:
    """The description of a PEFT layer; None for other modules and for layers without an active adapter."""
    if not hasattr(module, "base_layer"):
        if hasattr(module, "modules_to_save"):
            raise UnsupportedOperation(
                f"{path} is in a block, which servers hold: modules_to_save works for modules outside of the blocks"
            )
        return None
    from peft.tuners import ia3, lora

    if module.merged:
        raise UnsupportedOperation(f"{path}: adapters cannot be merged into weights that servers hold")
    if module.disable_adapters or not _active_names(module):
        return None
    if module._forward_pre_hooks:
        raise UnsupportedOperation(
            f"{path} has hooks, which servers do not call",
            hint="adapter_names= needs hooks: call the model once for each adapter instead",
        )
    name = _active_name(module)
    match module:
        case ia3.Linear():
            return IA3(module=path, feedforward=bool(module.is_feedforward))
        case lora.Linear() if set(module.lora_variant) <= {name} and (
            not module.lora_variant or module.use_dora.get(name)
        ):
            dropout = module.lora_dropout[name]
            return Lora(
                module=path,
                rank=module.r[name],
                scaling=float(module.scaling[name]),
                dropout=dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
                bias=bool(module.lora_bias[name]),
                dora=bool(module.use_dora[name]),
            )
    raise UnsupportedOperation(
        f"{path}: servers do not compute {type(module).__module__}.{type(module).__name__}",
        hint="LoRA (with rsLoRA and DoRA) and IA3 on linear layers can be trained",
    )


def _active_names(module: Any) -> list[str]:
    """The active adapters for which this PEFT layer has parameters."""
    own = [getattr(module, parts) for parts in module.adapter_layer_names]
    return [name for name in module.active_adapters if any(name in parts for parts in own)]


def _active_name(module: Any) -> str:
    active = _active_names(module)
    if len(active) > 1:
        raise UnsupportedOperation(
            f"{len(active)} adapters are active at once, but servers compute one",
            hint="combine them first: model.add_weighted_adapter",
        )
    return active[0]


def _parameters(layer: Any, name: str) -> list[Tensor]:
    """The parameters of a PEFT layer, in the order of `Lora.shapes` and `IA3.shapes`."""
    if hasattr(layer, "ia3_l"):
        return [layer.ia3_l[name]]
    optional = [layer.lora_B[name].bias, layer.lora_magnitude_vector[name].weight if layer.use_dora[name] else None]
    return [
        layer.lora_A[name].weight,
        layer.lora_B[name].weight,
        *(parameter for parameter in optional if parameter is not None),
    ]
