"""A client's adapters as numbers: what PEFT has added to its skeletons, described, named, and ready to travel.

On a server they become PEFT's layers again (`shoal.model.peft.block_adapters`).
"""

# P tokens of a prompt, D hidden size, N factors

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shoal.adapters import IA3, Lora, Prompt, adapter_name
from shoal.errors import UnsupportedOperation
from shoal.spans import Span

Layer = Lora | IA3 | Prompt


@dataclass(frozen=True)
class Factors:
    """A block's adapter as it travels: `values` [N] are those of all its layers at one moment.

    Those of the same `origin` at other moments are other versions of it. Servers that host the adapter of the name
    `hosted` are likely to have them (`shoal.model.peft.peft_folder`).
    """

    name: str
    block: int
    layers: tuple[Layer, ...]
    values: Tensor
    origin: int = 0
    hosted: str | None = None

    @property
    def num_tensors(self) -> int:
        """Of how many tensors they are."""
        return sum(1 if isinstance(layer, Prompt) else len(layer.shapes(1, 1)) for layer in self.layers)

    @property
    def drops(self) -> bool:
        """Whether it drops anything at random."""
        return any(isinstance(layer, Lora) and layer.dropout > 0 for layer in self.layers)


@dataclass(frozen=True)
class FactorGradients:
    """Those [N] of a block's factors; the tensors of these numbers had no part in what was computed."""

    values: Tensor
    unused: frozenset[int] = frozenset()

    def __add__(self, other: FactorGradients) -> FactorGradients:
        """Those of both computations together, in no less than float32: more may be added to them."""
        return FactorGradients(self.values.float() + other.values, self.unused & other.unused)


@dataclass(frozen=True)
class Tuning:
    """The adapters of all blocks that have one, at one moment."""

    blocks: Mapping[int, Factors] = field(default_factory=dict)

    def names(self, span: Span) -> tuple[str | None, ...]:
        """What those of some blocks are called, as a message has it; nothing if there are none."""
        found = [self.blocks.get(block) for block in span]
        return tuple(None if each is None else each.name for each in found) if any(found) else ()

    def of(self, span: Span) -> list[Factors]:
        """Those of some blocks."""
        return [self.blocks[block] for block in span if block in self.blocks]

    @property
    def drops(self) -> bool:
        """Whether any drops something at random."""
        return any(each.drops for each in self.blocks.values())


def check_configs(configs: Mapping[str, Any]) -> None:
    """Raise `UnsupportedOperation` for what PEFT was told to add to blocks and has not found there."""
    for config in configs.values():
        if parameters := ", ".join(sorted(getattr(config, "target_parameters", None) or ())):
            raise UnsupportedOperation(
                f"servers add to linear layers, not to parameters such as those of experts: {parameters}",
                hint=f"name the linear layers: target_modules={sorted(config.target_modules or ())}",
            )


@dataclass(frozen=True)
class Tuned:
    """A block's layers and the client's own parameters for them, in the order of their factors."""

    block: int
    layers: tuple[Layer, ...]
    parameters: tuple[Tensor, ...]

    def factors(self, *, hosted: str | None = None) -> Factors:
        """What they are now."""
        dtypes = {parameter.dtype for parameter in self.parameters}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        values = torch.cat([parameter.detach().to("cpu", dtype).flatten() for parameter in self.parameters])
        name, origin = name_of(self.block, self.layers, values), id(self.parameters[0])
        return Factors(name, self.block, self.layers, values, origin=origin, hosted=hosted)

    def gradients(self, found: FactorGradients) -> list[Tensor | None]:
        """What of a gradient belongs to which parameter."""
        parts = found.values.split([parameter.numel() for parameter in self.parameters])
        return [
            None if index in found.unused else part.view(own.shape).to(own)
            for index, (part, own) in enumerate(zip(parts, self.parameters, strict=True))
        ]


def name_of(block: int, layers: Sequence[Layer], values_N: Tensor) -> str:
    """What an adapter of a block is called that has these layers and factors."""
    return adapter_name(block, layers, str(values_N.dtype), values_N.contiguous().view(torch.uint8).numpy().data)


def tuned_block(block: int, skeleton: nn.Module, prompt_PD: Tensor | None = None) -> Tuned | None:
    """What PEFT, and a prompt, have added to a block; `None` if nothing is active.

    Raises `UnsupportedOperation` for kinds of layers that servers do not compute.
    """
    layers: list[Layer] = []
    parameters: list[Tensor] = []
    for path, module in skeleton.named_modules():
        layer = _described(path, module)
        if layer is not None:
            layers.append(layer)
            parameters += parameters_of(module, _active(module))
    if prompt_PD is not None:
        layers.append(Prompt(num_tokens=prompt_PD.shape[0]))
        parameters.append(prompt_PD)
    return Tuned(block, tuple(layers), tuple(parameters)) if layers else None


def _described(path: str, module: nn.Module) -> Layer | None:
    """What a layer of PEFT's is like; `None` for other modules, and for one that does nothing now."""
    if not hasattr(module, "base_layer"):
        if hasattr(module, "modules_to_save"):
            raise UnsupportedOperation(
                f"{path} is in a block, which servers hold: modules_to_save are for what this side holds"
            )
        return None
    from peft.tuners import ia3, lora

    if module.merged:
        raise UnsupportedOperation(f"{path}: adapters cannot be merged into weights that servers hold")
    if module.disable_adapters or not _own(module):
        return None
    if module._forward_pre_hooks:
        raise UnsupportedOperation(
            f"{path} has hooks, which servers do not call",
            hint="adapter_names= needs them: call the model once for each adapter",
        )
    name = _active(module)
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


def unmeasured(skeleton: nn.Module, *, loaded: Collection[str] = ()) -> dict[str, Tensor]:
    """DoRA's magnitudes that are still to be found, by their layers: those of new layers are norms of the weights.

    Those of the adapters `loaded` are about to be read from a file.
    Raises `UnsupportedOperation` where they are norms of something else as well.
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


def _own(module: Any) -> list[str]:
    """The active adapters that this layer has, of whatever kind it is."""
    own = [getattr(module, parts) for parts in module.adapter_layer_names]
    return [name for name in module.active_adapters if any(name in parts for parts in own)]


def _active(module: Any) -> str:
    active = _own(module)
    if len(active) > 1:
        raise UnsupportedOperation(
            f"{len(active)} adapters are active at once; servers compute one",
            hint="combine them first: model.add_weighted_adapter",
        )
    return active[0]


def parameters_of(layer: Any, name: str) -> list[Tensor]:
    """The parameters of a layer of PEFT's, in the order in which `Lora.shapes` and `IA3.shapes` have them."""
    if hasattr(layer, "ia3_l"):
        return [layer.ia3_l[name]]
    optional = [layer.lora_B[name].bias, layer.lora_magnitude_vector[name].weight if layer.use_dora[name] else None]
    return [
        layer.lora_A[name].weight,
        layer.lora_B[name].weight,
        *(parameter for parameter in optional if parameter is not None),
    ]
