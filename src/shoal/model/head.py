"""The client's half of a model: the Transformers class itself, whose layers are one call into the swarm.

Embeddings, final norm, output head, losses and `generate()` are Transformers' own. Only the list of layers is replaced.
In its place the backbone finds a single layer, which passes the hidden states to `blocks`, together with the attention
mask and the positions that the caller gave.
"""

# B rows, T new tokens, S tokens so far with the new ones, D hidden size

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.configuration_utils import GenerationMode

from shoal.errors import UnsupportedModel, UnsupportedOperation
from shoal.model.candidates import limit_candidates
from shoal.model.copying import NotPicklable
from shoal.model.families import LAYERS_RETURN_TUPLE, Family, find_backbone, text_config
from shoal.model.module_view import with_layers
from shoal.model.peft.prompts import PROMPT, with_prompt, without_prompt
from shoal.model.placeholders import PassThroughLayer
from shoal.model.remote_cache import (
    USE_CACHE_UNSET,
    RemoteCache,
    Session,
    UnopenedSession,
    cache_argument,
    cache_for_call,
    cache_in,
    check_mask_length,
    full_mask,
)
from shoal.model.unsupported_outputs import check_cache_choice, check_outputs
from shoal.model.weights.completeness import check_loaded

NO_ATTENTION = "shoal"
"""The attention implementation of a client's backbone. It is never called; its masks have one element."""


def _no_mask(*_: Any, device: torch.device | None = None, **__: Any) -> Tensor:
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


AttentionMaskInterface.register(NO_ATTENTION, _no_mask)


class Blocks(Protocol):
    """All the blocks of a model, computed elsewhere. An implementation is an `nn.Module`."""

    def __call__(
        self,
        hidden_BTD: Tensor,
        *,
        attention_mask: Tensor | None,  # [B, S], 0 where a token is padding
        position_ids: Tensor | None,  # [B, T]
        past_key_values: Cache | None,
    ) -> Tensor: ...

    def new_session(self, *, batch_size: int, max_length: int) -> Session:
        """A session that is expected to reach `max_length` tokens. It may become longer."""

    def active_session(self) -> Session | None:
        """The session whose `with` block the caller is in; None outside of one."""


class _BlocksCall(PassThroughLayer):
    """The only layer of a client's backbone, for one call."""

    def __init__(self, layer: nn.Module, *, returns_tuple: bool, blocks: nn.Module, **arguments: Any) -> None:
        super().__init__(layer, returns_tuple=returns_tuple)
        self._call = functools.partial(blocks, **arguments)

    def compute(self, hidden_BTD: Tensor) -> Tensor:
        output_BTD: Tensor = self._call(hidden_BTD)
        return output_BTD


class _BackboneMixin(NotPicklable):
    """Mixed into a client's backbone: each forward pass runs on a view whose only layer calls the blocks."""

    _layers_name: str
    _meta_layers: list[nn.Module]  # in a list, so that they are not registered as submodules
    config: PreTrainedConfig

    def __getattr__(self: Any, name: str) -> Any:
        """Offer BLOOM's names `h` and `word_embeddings` in every family, as PETALS does for its models."""
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            if name == "h":
                return self._modules[self._layers_name]
            if name == "word_embeddings":
                return self.get_input_embeddings()
            raise

    @torch.compiler.disable(reason="blocks are computed by servers")  # type: ignore[untyped-decorator]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the backbone's own forward pass with the blocks in place of its layers.

        Raises `UnsupportedOperation` or `UserError` for a cache, a mask or an output that servers do not support.
        """
        names = inspect.signature(super().forward).parameters  # type: ignore[misc]
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        cache = self._choose_cache(kwargs, cache_argument(names))
        check_outputs(self.config, kwargs)
        mask = _checked_mask(kwargs, cache)
        if mask is None and cache is not None and cache.session.num_tokens and "past_key_values" in names:
            # Recurrent families work without a mask.
            kwargs["attention_mask"] = mask = full_mask(cache, kwargs)
        ids_and_mask = kwargs.get("input_ids"), mask
        prompt: nn.Embedding | None = getattr(self, PROMPT, None)
        is_prompted = False
        if prompt is not None:
            num_seen = 0 if cache is None else cache.session.num_tokens
            is_prompted = with_prompt(kwargs, prompt, self.get_input_embeddings(), num_seen=num_seen)
            mask = kwargs.get("attention_mask")
        if cache is not None and mask is not None and mask.all() and not cache.session.num_tokens:
            mask = None  # `generate()` always gives a mask; one of ones need not be sent
        view = self._view(mask, kwargs.get("position_ids"), cache)
        if prompt is not None and "position_ids" not in names:
            kwargs.pop("position_ids", None)
        output = super(_BackboneMixin, view).forward(**kwargs)  # type: ignore[misc]
        if cache is not None:
            cache.session.record_token_ids(*ids_and_mask)
        return output if prompt is None or not is_prompted else without_prompt(output, prompt.num_embeddings)

    def _choose_cache(self: Any, kwargs: dict[str, Any], argument: str) -> RemoteCache | None:
        """The cache of this call; `kwargs` are changed to say so. Raises `UnsupportedOperation` for another kind."""
        cache: RemoteCache | None = cache_in(kwargs)
        if cache is None:
            saves_memory = self.training and getattr(self, "gradient_checkpointing", False)  # as in Transformers
            by_default = getattr(self.config, "use_cache", False) and not saves_memory
            cache = cache_for_call(self._modules[self._layers_name], kwargs, by_default=by_default)
            kwargs["use_cache"] = cache is not None
            kwargs[argument] = cache
        elif not isinstance(cache, RemoteCache):
            raise UnsupportedOperation(f"the blocks are on servers: {type(cache).__name__} cannot hold their state")
        return cache

    def _view(self: Any, mask: Tensor | None, positions: Tensor | None, cache: RemoteCache | None) -> Any:
        """A copy of this backbone for one call: its only layer calls the blocks, and it builds no masks."""
        layer = _BlocksCall(
            self._meta_layers[0],
            returns_tuple=self.config.model_type in LAYERS_RETURN_TUPLE,
            blocks=self._modules[self._layers_name],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
        )
        view = with_layers(self, self._layers_name, [layer])
        view.__dict__["config"] = copy.copy(self.config)
        view.config.__dict__["_attn_implementation_internal"] = NO_ATTENTION
        return view


def _checked_mask(kwargs: Mapping[str, Any], cache: RemoteCache | None) -> Tensor | None:
    """The attention mask of a call. Raises `UnsupportedOperation` or `UserError` if servers cannot use it."""
    mask: Tensor | None = kwargs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise UnsupportedOperation("only attention masks of shape [batch, tokens] can be sent to servers")
    if cache is not None and mask is not None and not isinstance(cache.session, UnopenedSession):
        check_mask_length(mask, cache, kwargs)
    return mask


class _HeadMixin:
    """Mixed into a Transformers class: the same model without its layers."""

    def __init__(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        _, backbone, layers_name = find_backbone(self, text_config(config))
        backbone._layers_name = layers_name
        backbone._meta_layers = list(getattr(backbone, layers_name))
        setattr(backbone, layers_name, nn.ModuleList())
        backbone.__class__ = _subclass(_BackboneMixin, type(backbone))  # type: ignore[arg-type]
        self._backbone_of_head = [backbone]  # in a list, so that it is not registered as a submodule twice

    def attach_blocks(self: Any, blocks: nn.Module) -> None:
        """Make `blocks` the model's layers."""
        setattr(self.backbone, self.backbone._layers_name, blocks)

    @property
    def backbone(self: Any) -> Any:
        """The module that owns the list of layers, and the soft prompt if there is one."""
        return self._backbone_of_head[0]

    @property
    def meta_layers(self: Any) -> list[nn.Module]:
        """The layers as Transformers built them, on the meta device."""
        layers: list[nn.Module] = self.backbone._meta_layers
        return layers

    @property
    def blocks(self: Any) -> Any:
        """The blocks that `attach_blocks` was given."""
        owner = self if "_layers_name" in self.__dict__ else self.backbone  # MPT's backbone has `blocks` of its own
        return owner._modules[owner._layers_name]

    def _prepare_cache_for_generation(
        self: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Open a session where Transformers would make a cache, and pass it in the family's cache argument."""
        name = cache_argument(inspect.signature(self.forward).parameters)
        cache = model_kwargs.get(name)
        check_cache_choice(generation_config.cache_implementation, cache)
        if isinstance(cache, RemoteCache):
            longest = cache.session.max_length
            if cache.ends_texts and max_cache_length > longest:
                generation_config.max_length -= max_cache_length - longest
            cache.session.expect(max_cache_length)
            if generation_mode == GenerationMode.ASSISTED_GENERATION:
                cache.session.crop(0)  # assisted decoding always passes the whole prompt
        if generation_config.use_cache is False or cache is not None:
            return
        rows = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1) * batch_size
        model_kwargs[name] = RemoteCache(self.blocks.new_session(batch_size=rows, max_length=max_cache_length))

    def _get_candidate_generator(self: Any, **arguments: Any) -> CandidateGenerator:
        """The generator of assisted decoding, limited to the `max_length` of the session."""
        generator = super()._get_candidate_generator(**arguments)  # type: ignore[misc]
        return limit_candidates(generator, cache_in(arguments["model_kwargs"]).session.max_length)


def distributed_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of `cls` that holds the client's half of such a model."""
    made = _subclass(_HeadMixin, cls)  # type: ignore[arg-type]
    if "forward" not in made.__dict__:
        made.forward = _marking_unset_use_cache(cls.forward)
    return made


def _marking_unset_use_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, but a `use_cache` that the caller leaves out arrives as `USE_CACHE_UNSET`."""
    names = list(inspect.signature(forward).parameters)

    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "use_cache" in names[len(args) + 1 :] and kwargs.get("use_cache") is None:
            kwargs["use_cache"] = USE_CACHE_UNSET
        return forward(self, *args, **kwargs)

    return wrapper


@functools.cache
def _subclass(mixin: type, cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    # Transformers chooses weight conversions, loss and cache by a class's name and module, so both are kept.
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__})


def build_head(
    cls: type[PreTrainedModel],
    family: Family,
    config: PreTrainedConfig,
    state_dict: Mapping[str, Tensor],
    *,
    blocks: nn.Module,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Build the client's half of a `cls` from a checkpoint's tensors, given by the checkpoint's names.

    `cls` must be a class for the language model alone, also if the checkpoint holds a vision tower. Tensors of the
    blocks are ignored and may be missing. Raises `UnsupportedModel` for a class that is more than a language model, and
    `CheckpointError` for a tensor that is missing or has another shape. A new task's own head may be missing, such as
    the `score` of a sequence classifier: then it is initialized, and Transformers logs a warning.
    """
    full_config, config = config, text_config(config)
    if full_config is not config and isinstance(full_config, cls.config_class):
        raise UnsupportedModel(f"{cls.__name__} is more than a language model, and a swarm serves only those")
    names = {name: family.name_in_head(name) for name in state_dict}
    model, info = distributed_class(cls).from_pretrained(
        None,
        config=config,
        state_dict={new: state_dict[name] for name, new in names.items() if new is not None},
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # check_loaded reports them
    )
    missing = info["missing_keys"]
    if not isinstance(model, GenerationMixin) and model.base_model is not model:
        missing = [name for name in missing if name.startswith(f"{cls.base_model_prefix}.")]
    # A checkpoint may hold more than this class uses, such as another task's head or a vision tower.
    check_loaded({**info, "missing_keys": missing, "unexpected_keys": ()})
    model.to(device)
    model.attach_blocks(blocks)
    return model
