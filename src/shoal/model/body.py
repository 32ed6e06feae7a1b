"""The server's half of a model: a span of its blocks, run by the family's own backbone.

The backbone keeps everything that it does between its layers and around them (masks, rotary embeddings, recurrent
state); its embeddings and its final norm are the client's and are left out. It is built from the config of the whole
model, so each layer is what it would be there, and *a block keeps its number*: in parameter names, in `layer_idx`, in
the cache, and in the backbone's loop over its layers, where stand-ins that do nothing precede the span. So nothing is
renamed, no config is cut, and whatever depends on a layer's depth (`config.layer_types[i]`) is right.
"""

# B rows, T new tokens, S tokens so far with the new ones, D hidden size

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from shoal.errors import CheckpointError
from shoal.model.body_cache import BodyCache
from shoal.model.families import Family, text_config
from shoal.model.linear.packed_linear import pack_linears
from shoal.model.linear.quantization import check_quantizer, quantized_config, stored_quantization
from shoal.model.linear.quantized_linear import replace_quantized_linears
from shoal.model.module_view import StandIn, entered_with, left_through, view_of
from shoal.spans import Span

PACKED = "shoal_packed"
"""The name under which Transformers finds the attention of packed passes."""


Changes = Mapping[int, Callable[[nn.Module], nn.Module]]
"""What stands in the place of some blocks for one call: a copy of each, with what a client adds to it."""
ChangesAt = Mapping[int, Callable[[nn.Module, int], nn.Module]]
"""The same for tokens that follow so many others."""


class Attend(Protocol):
    """The attention of one packed pass: from queries `[1, H, T, K]`, new keys and new values to `[1, T, H, V]`."""

    def __call__(self, block: int, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor: ...


class Body(nn.Module):
    """A span of blocks. Its weights are frozen; it is differentiable with respect to what goes in."""

    def __init__(self, backbone: PreTrainedModel, family: Family, span: Span) -> None:
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)
        self.family = family
        self.span = span
        self._parameters_of_forward = inspect.signature(backbone.forward).parameters
        self._stand_ins = [
            StandIn(layer, returns_tuple=family.layers_return_tuple) for layer in backbone.all_layers[: span.end]
        ]

    def forward(
        self,
        hidden_BTD: Tensor,
        *,
        span: Span | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: BodyCache | None = None,
        changes: ChangesAt | None = None,
    ) -> Tensor:
        """Run the blocks of `span` (all of them by default) on hidden states; returns hidden states `[B, T, D]`.

        `attention_mask` `[B, S]` is 0 where a token is padding; `None` means that none is. `position_ids` `[B, T]`
        count on from the cache by default. What `cache` holds is attended to, and the new tokens are added to it;
        with a cache nothing is differentiable. `changes` are made to blocks for this call, at the tokens that are new.
        """
        span = span or self.span
        if span not in self.span or (cache is not None and cache.span != span):
            raise ValueError(f"blocks {span}: not of this body ({self.span}), or not those of the cache")
        num_tokens = hidden_BTD.shape[1]
        num_seen = num_tokens if cache is None else cache.num_tokens + num_tokens
        if attention_mask is not None and attention_mask.shape[1] != num_seen:
            raise ValueError(f"a mask of {attention_mask.shape[1]} tokens, where there are {num_seen}")
        if cache is None:
            return self._compute(
                hidden_BTD, span, attention_mask=attention_mask, position_ids=position_ids, changes=_at(0, changes)
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
                        cache=cache,
                        changes=_at(cache.num_tokens, changes),
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
        attend: Attend,
        changes: Changes | None = None,
    ) -> Tensor:
        """Run the blocks of `span` on tokens of many sequences in a row; returns hidden states `[T, D]`.

        Only `attend` knows which token belongs to which sequence, and where the sequences' pasts are. For families
        that are certified for it (`Family.packable`).
        """
        with self._attention(PACKED):
            return self._compute(hidden_TD[None], span, position_ids=positions_T[None], attend=attend, changes=changes)[
                0
            ]

    @contextlib.contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        """Attention as `name` says: layers ask their config at every call. One thread at a time uses a body."""
        config = self.backbone.config
        usual = config._attn_implementation
        config._attn_implementation = name
        try:
            yield
        finally:
            config._attn_implementation = usual

    def _compute(
        self,
        hidden_BTD: Tensor,
        span: Span,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: BodyCache | None = None,
        attend: Attend | None = None,
        changes: Changes | None = None,
    ) -> Tensor:
        outputs: list[Tensor] = []
        layers = [self.block(block) for block in span]
        layers[0] = entered_with(layers[0], hidden_BTD)
        for block in span:
            if changes is not None and block in changes:
                layers[block - span.start] = changes[block](layers[block - span.start])
        layers[-1] = left_through(layers[-1], outputs.append)
        view = view_of(self.backbone, self.family.layers_name, [*self._stand_ins[: span.start], *layers])
        accepted = self._parameters_of_forward
        arguments: dict[str, Any] = {"inputs_embeds": hidden_BTD, "use_cache": cache is not None}
        if position_ids is not None and "position_ids" in accepted:
            arguments["position_ids"] = position_ids
        if attend is not None:
            arguments["attend"] = attend
        state = None if cache is None else cache.state
        if "cache_params" in accepted:
            # purely recurrent: the past is in the state, and the mask is of the new tokens alone
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


def _at(num_tokens: int, changes: ChangesAt | None) -> Changes | None:
    if changes is None:
        return None
    return {block: functools.partial(_changed, change, num_tokens) for block, change in changes.items()}


def _changed(change: Callable[[nn.Module, int], nn.Module], num_tokens: int, layer: nn.Module) -> nn.Module:
    return change(layer, num_tokens)


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attend: Attend,
    **options: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface, handed on to the pass that is under way."""
    return attend(module.layer_idx, query, key, value, **options), None  # type: ignore[arg-type]


AttentionInterface.register(PACKED, _packed_attention)


class ClientSide(nn.Module):
    """Stands in a server's backbone for a module whose work the client does.

    What it returns is never used, but must pass for the real thing: hidden states come back as they are, anything else
    (token or position numbers, a mask) gives a zero that can be added to hidden states.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        tensors = [argument for argument in (*args, *kwargs.values()) if isinstance(argument, Tensor)]
        hidden = (tensor for tensor in tensors if tensor.is_floating_point() and tensor.dim() == 3)
        return next(hidden, torch.zeros((), device=tensors[0].device))


def build_body(
    family: Family,
    config: PreTrainedConfig,
    span: Span,
    state_dict: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quantization_config: Any = None,
    keep: Callable[[Mapping[str, Tensor]], None] | None = None,
) -> Body:
    """Build the blocks of `span` from a checkpoint's tensors, under the checkpoint's own names.

    Transformers converts and quantizes the weights as when it loads the whole model. Tensors that are not the span's
    are ignored, and need not be there. `keep` is given the tensors as they were loaded, converted and quantized, by
    the backbone's names. Raises `CheckpointError` for a tensor that is missing, unknown or misshapen, and `UserError`
    for a quantization that this machine lacks something for.
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
        ignore_mismatched_sizes=True,  # reported below, all of them, as our own error
    )
    del state_dict, weights  # a weight that is packed is let go of at once, unless the caller keeps it
    check_loaded(info)
    if keep is not None:
        keep(backbone.state_dict())
    if is_quantized:
        replace_quantized_linears(backbone, dtype=dtype)
    else:
        backbone.to(device)
    pack_linears(backbone)
    return Body(backbone, family, span)


def check_loaded(info: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` unless every tensor of a model was in the checkpoint, and the other way round."""
    if info["missing_keys"]:
        raise CheckpointError(f"the checkpoint lacks {_some(sorted(info['missing_keys']))}")
    if info["mismatched_keys"]:
        name, found, expected = sorted(info["mismatched_keys"])[0]
        raise CheckpointError(f"{name} is {list(found)} in the checkpoint but {list(expected)} in the model")
    if info["unexpected_keys"]:
        raise CheckpointError(f"the model has no place for {_some(sorted(info['unexpected_keys']))}")
    if info.get("error_msgs"):
        raise CheckpointError("; ".join(info["error_msgs"]))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _span_class(family: Family, span: Span) -> type[PreTrainedModel]:
    """The family's backbone, without what the client holds and the blocks outside `span`.

    It bears the backbone's own name and module, by which Transformers finds a class's weight conversions.
    """

    def __init__(self: PreTrainedModel, config: PreTrainedConfig) -> None:  # noqa: N807
        family.backbone.__init__(self, config)
        layers = self.get_submodule(family.layers_name)
        kept = nn.ModuleList()
        for block in span:
            kept.add_module(str(block), layers.get_submodule(str(block)))
        for name, child in list(self.named_children()):
            if next(child.parameters(), None) is not None:
                setattr(self, name, ClientSide())
        setattr(self, family.layers_name, kept)
        self.all_layers = list(layers)  # a list is no submodule: those not kept stay without weights
        for name in self._parameters:
            self._parameters[name] = None

    base = family.backbone
    return type(base.__name__, (base,), {"__init__": __init__, "__module__": base.__module__})
