"""The server's half of a model: a span of its blocks, run by the family's own backbone.

The backbone keeps its own code around the layers (masks, rotary embeddings, recurrent state). The client computes the
embeddings and the final norm, so they are left out. The backbone is built from the config of the whole model, and *a
block keeps its number*: in parameter names, in `layer_idx`, in the cache, and in the backbone's loop over its layers,
where pass-through layers precede the span. Therefore no parameter is renamed, and settings that depend on a layer's
depth (`config.layer_types[i]`) are right.
"""

# B rows, T new tokens, S tokens so far with the new ones, D hidden size

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from shoal.model.body_cache import BodyCache
from shoal.model.families import Family, text_config
from shoal.model.linear.packed_linear import pack_linears
from shoal.model.linear.quantization import check_quantizer, quantized_config, stored_quantization
from shoal.model.linear.quantized_linear import replace_quantized_linears
from shoal.model.module_view import with_fixed_input, with_layers, with_output_observer
from shoal.model.placeholders import ClientModuleStub, PassThroughLayer
from shoal.model.weights.completeness import check_loaded
from shoal.spans import Span

PACKED = "shoal_packed"
"""The name of packed attention in Transformers' attention interface."""


BlockOverrides = Mapping[int, Callable[[nn.Module], nn.Module]]
"""For some blocks, a function from the block to the module that replaces it in one call, usually with an adapter."""
BlockOverridesAt = Mapping[int, Callable[[nn.Module, int], nn.Module]]
"""The same, but the function is also given the number of tokens that precede the new ones."""


class AttentionFunction(Protocol):
    """The attention of one packed pass.

    It is given queries [1, H, T, K], new keys and new values, and returns [1, T, H, V]: H heads, K and V sizes of a
    head's key and value.
    """

    def __call__(self, block: int, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor: ...


class Body(nn.Module):
    """A span of blocks. Its weights are frozen; gradients reach its inputs."""

    def __init__(self, backbone: PreTrainedModel, family: Family, span: Span) -> None:
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)
        self.family = family
        self.span = span
        self._parameters_of_forward = inspect.signature(backbone.forward).parameters
        self._pass_through = [
            PassThroughLayer(layer, returns_tuple=family.layers_return_tuple)
            for layer in backbone.all_layers[: span.end]
        ]
        self._rotaries = [each for each in backbone.modules() if "dynamic" in str(getattr(each, "rope_type", ""))]

    def forward(
        self,
        hidden_BTD: Tensor,
        *,
        span: Span | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: BodyCache | None = None,
        overrides: BlockOverridesAt | None = None,
    ) -> Tensor:
        """Run the blocks of `span` (all blocks by default) on hidden states; returns hidden states [B, T, D].

        `attention_mask` [B, S] is 0 where a token is padding; None means that there is no padding. `position_ids`
        [B, T] continue from the cache by default. The new tokens attend to those in `cache` and are added to it. With
        a cache there are no gradients. `overrides` replace blocks in this call. Raises `ValueError` if a span, a mask
        or a cache does not fit.
        """
        span = span or self.span
        if span not in self.span or (cache is not None and cache.span != span):
            raise ValueError(f"blocks {span} are not in this body ({self.span}), or the cache is of other blocks")
        num_tokens = hidden_BTD.shape[1]
        num_seen = num_tokens if cache is None else cache.num_tokens + num_tokens
        if attention_mask is not None and attention_mask.shape[1] != num_seen:
            raise ValueError(f"a mask of {attention_mask.shape[1]} tokens, where there are {num_seen}")
        if cache is None:
            return self._compute(
                hidden_BTD, span, attention_mask=attention_mask, position_ids=position_ids, overrides=_at(0, overrides)
            )
        step = 1 if self.family.step_by_step and cache.num_tokens > 0 else num_tokens
        outputs = []
        with torch.no_grad():
            for start in range(0, num_tokens, step):
                new = slice(start, start + step)
                mask = None if attention_mask is None else attention_mask[:, : cache.num_tokens + step]
                positions = None if position_ids is None else position_ids[..., new]
                outputs.append(
                    self._compute(
                        hidden_BTD[:, new],
                        span,
                        attention_mask=mask,
                        position_ids=positions,
                        state=cache.state,
                        overrides=_at(cache.num_tokens, overrides),
                    )
                )
                cache.advance(step)
        return torch.cat(outputs, dim=1)

    def forward_packed(
        self,
        hidden_TD: Tensor,
        positions_T: Tensor,
        *,
        span: Span,
        attend: AttentionFunction,
        overrides: BlockOverrides | None = None,
    ) -> Tensor:
        """Run the blocks of `span` on the tokens of several sequences in one row; returns hidden states [T, D].

        Only `attend` knows which token belongs to which sequence, and where the earlier keys and values are. The family
        must be certified for it (`Family.packable`).
        """
        with self._attention(PACKED):
            output_1TD = self._compute(
                hidden_TD[None], span, position_ids=positions_T[None], attend=attend, overrides=overrides
            )
            return output_1TD[0]

    def forward_batch(
        self,
        hidden_GTD: Tensor,
        positions_GT: Tensor,
        *,
        span: Span,
        state: Any,
        attention_mask: Tensor | None = None,
        overrides: BlockOverrides | None = None,
    ) -> Tensor:
        """Run the blocks of `span` on the next tokens of a batch; returns hidden states [G, T, D].

        `state` has their past in the terms of Transformers' caches, and takes their new keys, values and states.
        `attention_mask` [G, S] is 0 where a token is padding. A family that is `step_by_step` takes one token at a time
        once there is a past.
        """
        return self._compute(
            hidden_GTD,
            span,
            attention_mask=attention_mask,
            position_ids=positions_GT,
            state=state,
            overrides=overrides,
        )

    @contextlib.contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        """Use this attention implementation: layers read it from their config at every call.

        Only one thread at a time may use a body.
        """
        config = self.backbone.config
        former = config._attn_implementation
        config._attn_implementation = name
        try:
            yield
        finally:
            config._attn_implementation = former

    def _compute(
        self,
        hidden_BTD: Tensor,
        span: Span,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        state: Any = None,
        attend: AttentionFunction | None = None,
        overrides: BlockOverrides | None = None,
    ) -> Tensor:
        outputs: list[Tensor] = []
        for rotary in self._rotaries:
            _forget_lengths(rotary)
        layers = [self.block(block) for block in span]
        layers[0] = with_fixed_input(layers[0], hidden_BTD)
        for block in span:
            if overrides is not None and block in overrides:
                layers[block - span.start] = overrides[block](layers[block - span.start])
        layers[-1] = with_output_observer(layers[-1], outputs.append)
        view = with_layers(self.backbone, self.family.layers_name, [*self._pass_through[: span.start], *layers])
        accepted = self._parameters_of_forward
        arguments: dict[str, Any] = {"inputs_embeds": hidden_BTD, "use_cache": state is not None}
        if position_ids is not None and "position_ids" in accepted:
            arguments["position_ids"] = position_ids
        if attend is not None:
            arguments["attend"] = attend
        if "cache_params" in accepted:
            # A purely recurrent family has the past in its state, and its mask covers the new tokens only.
            mask = None if attention_mask is None else attention_mask[:, -hidden_BTD.shape[1] :]
            view(**arguments, attention_mask=mask, cache_params=state)
        else:
            view(**arguments, attention_mask=attention_mask, past_key_values=state)
        return outputs[0]

    def new_cache(self, span: Span | None = None) -> BodyCache:
        """An empty cache for one session that uses the blocks of `span`."""
        return BodyCache(self.backbone.config, span or self.span)

    def block(self, block: int) -> nn.Module:
        """The layer of one block, by its number in the model."""
        layer: nn.Module = self.backbone.get_submodule(f"{self.family.layers_name}.{block}")
        return layer


def _forget_lengths(rotary: nn.Module) -> None:
    """Let dynamic rotary embeddings begin anew: they keep the frequencies of the longest sequence that they have seen.

    A module may have several, for different kinds of layers; their attributes have the kind as a prefix.
    """
    original: Any = rotary.original_max_seq_len
    for name in [name for name in vars(rotary) if name.endswith("max_seq_len_cached")]:
        prefix = name.removesuffix("max_seq_len_cached")
        if getattr(rotary, name) != original:
            setattr(rotary, name, original)
            rotary.register_buffer(f"{prefix}inv_freq", getattr(rotary, f"{prefix}original_inv_freq"), persistent=False)


def _at(num_tokens: int, overrides: BlockOverridesAt | None) -> BlockOverrides | None:
    """The overrides for tokens that follow `num_tokens` others."""
    if overrides is None:
        return None
    return {block: functools.partial(_apply, override, num_tokens) for block, override in overrides.items()}


def _apply(override: Callable[[nn.Module, int], nn.Module], num_tokens: int, layer: nn.Module) -> nn.Module:
    return override(layer, num_tokens)


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attend: AttentionFunction,
    **options: Any,
) -> tuple[Tensor, None]:
    """Call the attention function of the current pass, from Transformers' attention interface."""
    return attend(module.layer_idx, query, key, value, **options), None  # type: ignore[arg-type]


AttentionInterface.register(PACKED, _packed_attention)


def build_body(
    family: Family,
    config: PreTrainedConfig,
    span: Span,
    state_dict: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quantization_config: Any = None,
    save: Callable[[Mapping[str, Tensor]], None] | None = None,
) -> Body:
    """Build the blocks of `span` from a checkpoint's tensors, given by the checkpoint's names.

    Transformers converts and quantizes the weights, as when it loads the whole model. Tensors outside of the span are
    ignored and may be missing. `save` is called with the converted and quantized tensors, by their names in the
    backbone. Raises `CheckpointError` for a tensor that is missing, unknown or of another shape, and `UserError` for a
    quantization that this machine lacks something for.
    """
    config = quantized_config(family, config, text_config(config), quantization_config)
    check_quantizer(config, quantization_config, dtype=dtype, device=device)
    is_quantized = quantization_config is not None or stored_quantization(config) is not None
    weights = {
        family.name_in_backbone(name): tensor
        for name, tensor in state_dict.items()
        if (block := family.block_of(name)) is not None and block in span
    }
    backbone, info = _span_class(family, span).from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=dtype,
        device_map={"": device} if is_quantized else None,
        quantization_config=quantization_config,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # check_loaded reports them
    )
    del state_dict, weights  # so that packing can free each weight at once, unless the caller still has it
    check_loaded(info)
    if save is not None:
        save(backbone.state_dict())
    if is_quantized:
        replace_quantized_linears(backbone, dtype=dtype)
    else:
        backbone.to(device)
    pack_linears(backbone)
    return Body(backbone, family, span)


def joined_body(parts: Sequence[Body], span: Span) -> Body:
    """One body for the blocks of `span`, of which each is in one of the `parts`.

    It shares their weights, and computes with the settings of the first one. Only the first one can be used beside it,
    on the same thread. Raises `ValueError` if a block is in none of them.
    """
    first = parts[0]
    layers = nn.ModuleList()
    for block in span:
        holder = next((part for part in parts if block in part.span), None)
        if holder is None:
            raise ValueError(f"block {block} is not there")
        layers.add_module(str(block), holder.block(block))
    for part in parts[1:]:  # layers read settings from the config of their backbone at every call
        config = part.backbone.config
        for module in part.backbone.modules():
            if module.__dict__.get("config") is config:
                module.config = first.backbone.config
    backbone = copy.copy(first.backbone)
    backbone.__dict__["_modules"] = {**first.backbone._modules, first.family.layers_name: layers}
    return Body(backbone, first.family, span)


def _span_class(family: Family, span: Span) -> type[PreTrainedModel]:
    """The family's backbone without the client's modules and without the blocks outside `span`.

    The class has the backbone's own name and module, because Transformers finds weight conversions by them.
    """

    def __init__(self: PreTrainedModel, config: PreTrainedConfig) -> None:  # noqa: N807
        family.backbone.__init__(self, config)
        layers = self.get_submodule(family.layers_name)
        of_span = nn.ModuleList()
        for block in span:
            of_span.add_module(str(block), layers.get_submodule(str(block)))
        for name, child in list(self.named_children()):
            if next(child.parameters(), None) is not None:
                setattr(self, name, ClientModuleStub())
        setattr(self, family.layers_name, of_span)
        # In a list, so that they are not registered as submodules and get no weights; those of the span as copies.
        self.all_layers = [copy.deepcopy(layer) if block in span else layer for block, layer in enumerate(layers)]
        for name in self._parameters:
            self._parameters[name] = None

    base = family.backbone
    return type(base.__name__, (base,), {"__init__": __init__, "__module__": base.__module__})
