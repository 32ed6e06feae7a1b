"""The client's half of a model: the Transformers class itself, its layers replaced by one call into the swarm.

Embeddings, final norm, output head, losses and `generate()` are Transformers' own. Only the list of layers is taken
out; in its place the backbone finds one layer that hands the hidden states to `blocks`, with the mask and the positions
as the caller gave them.
"""

# B rows, T new tokens, S tokens so far with the new ones, D hidden size

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.configuration_utils import GenerationMode

from shoal.errors import UnsupportedModel, UnsupportedOperation, UserError
from shoal.model.body import check_loaded
from shoal.model.copying import NotPickled
from shoal.model.families import LAYERS_RETURN_TUPLE, Family, find_backbone, text_config
from shoal.model.module_view import StandIn, view_of
from shoal.model.peft.prompts import PROMPT, with_prompt, without_prompt
from shoal.model.unsupported_outputs import check_cache_choice, check_outputs

CACHE_NAMES = ("past_key_values", "cache_params")
"""What families call their cache."""
UNSAID = "not said"
"""In the place of a `use_cache` that was not given: some families put the config's in its place on the way in."""
NO_ATTENTION = "shoal"  # the name of an attention implementation that is never run: it has masks of one element


def _no_mask(*_: Any, device: torch.device | None = None, **__: Any) -> Tensor:
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


AttentionMaskInterface.register(NO_ATTENTION, _no_mask)


class Session(Protocol):
    """What the client keeps of a generation, as far as Transformers' cache needs it."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def max_length(self) -> int: ...
    def crop(self, num_tokens: int) -> None: ...
    def select_rows(self, rows: Sequence[int]) -> None: ...
    def expect(self, num_tokens: int) -> None: ...
    def note_ids(self, ids_BT: Tensor | None, mask_BS: Tensor | None) -> None: ...


class NotBegun:
    """In the place of a session that nobody may ever need: that of a call that did not say whether it wants a cache.

    The blocks compute such a call without a session, and put one here that is opened when it is used.
    """

    num_tokens = 0
    batch_size = 1
    max_length = sys.maxsize

    def crop(self, num_tokens: int) -> None: ...
    def select_rows(self, rows: Sequence[int]) -> None: ...
    def expect(self, num_tokens: int) -> None: ...
    def note_ids(self, ids_BT: Tensor | None, mask_BS: Tensor | None) -> None: ...


class Blocks(Protocol):
    """All the blocks of a model, somewhere else; must be an `nn.Module`."""

    def __call__(
        self,
        hidden_BTD: Tensor,
        *,
        attention_mask: Tensor | None,  # [B, S], 0 where a token is padding
        position_ids: Tensor | None,  # [B, T]
        past_key_values: Cache | None,
    ) -> Tensor: ...

    def new_session(self, *, batch_size: int, max_length: int) -> Session:
        """A session that is expected to get `max_length` tokens long, and may get longer."""

    def active_session(self) -> Session | None:
        """That in whose `with` block this is called."""


class HeadCache(Cache):  # type: ignore[misc]
    """A session in the shape of Transformers' cache: it counts tokens, rewinds and reorders, and stores nothing."""

    def __init__(self, session: Session) -> None:
        super().__init__(layers=[])
        self.session = session
        self.head_call: Any = None  # what the call that is under way wants of the blocks beside hidden states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.session.num_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.session.num_tokens + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.session.num_tokens > 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError("Transformers crops by a negative number of tokens")
        if tokens_to_remove < 0:
            self.session.crop(self.session.num_tokens + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.session.num_tokens > 0:
            self._select([row for row in range(self.session.batch_size) for _ in range(repeats)])

    def _select(self, rows: list[int]) -> None:
        if self.session.num_tokens > 0:
            self.session.select_rows(rows)

    def activate_past_recording(self) -> None:
        """Nothing to do: a session can always be rebuilt from its inputs."""

    @property
    def is_initialized(self) -> bool:
        return self.session.num_tokens > 0

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return [False]

    @property
    def is_linear(self) -> list[bool]:
        return [False]

    @property
    def is_dummy(self) -> list[bool]:
        return [False]


class _BlocksCall(StandIn):
    """The one layer of a client's backbone, for one call."""

    def __init__(self, layer: nn.Module, *, returns_tuple: bool, blocks: nn.Module, **arguments: Any) -> None:
        super().__init__(layer, returns_tuple=returns_tuple)
        self._call = functools.partial(blocks, **arguments)

    def compute(self, hidden_BTD: Tensor) -> Tensor:
        output_BTD: Tensor = self._call(hidden_BTD)
        return output_BTD


class _HeadBackbone(NotPickled):
    """Mixed into a client's backbone: each forward runs on a view whose only layer calls the blocks."""

    _layers_name: str
    _layers_elsewhere: list[nn.Module]  # in a list, so that they are no submodules: they have no weights
    config: PreTrainedConfig

    def __getattr__(self: Any, name: str) -> Any:
        """What is called `h` and `word_embeddings` in BLOOM is there by these names in any family."""
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
        names = inspect.signature(super().forward).parameters  # type: ignore[misc]
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        blocks = self._modules[self._layers_name]
        cache = _cache_of(kwargs)
        if cache is None:
            saves_memory = self.training and getattr(self, "gradient_checkpointing", False)  # as in Transformers
            cache = new_cache(blocks, kwargs, by_default=getattr(self.config, "use_cache", False) and not saves_memory)
            kwargs["use_cache"] = cache is not None
            kwargs[cache_name(names)] = cache
        elif not isinstance(cache, HeadCache):
            raise UnsupportedOperation(f"the blocks are elsewhere: {type(cache).__name__} cannot hold their state")
        check_outputs(self.config, kwargs)
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise UnsupportedOperation("only attention masks of shape [batch, tokens] can be sent to servers")
        if cache is not None and mask is not None and not isinstance(cache.session, NotBegun):
            _check_length(mask, cache, kwargs)
        if mask is None and cache is not None and cache.session.num_tokens and "past_key_values" in names:
            kwargs["attention_mask"] = mask = _no_padding(cache, kwargs)  # recurrent families leave it out
        ids_and_mask = kwargs.get("input_ids"), mask
        prompt: nn.Embedding | None = getattr(self, PROMPT, None)
        is_prompted = False
        if prompt is not None:
            num_seen = 0 if cache is None else cache.session.num_tokens
            is_prompted = with_prompt(kwargs, prompt, self.get_input_embeddings(), num_seen=num_seen)
            mask = kwargs.get("attention_mask")
        if cache is not None and mask is not None and mask.all() and not cache.session.num_tokens:
            mask = None  # `generate` always gives one; what says nothing need not travel
        layer = _BlocksCall(
            self._layers_elsewhere[0],
            returns_tuple=self.config.model_type in LAYERS_RETURN_TUPLE,
            blocks=blocks,
            attention_mask=mask,
            position_ids=kwargs.get("position_ids"),
            past_key_values=cache,
        )
        view = view_of(self, self._layers_name, [layer])
        view.__dict__["config"] = copy.copy(self.config)
        view.config.__dict__["_attn_implementation_internal"] = NO_ATTENTION
        if prompt is not None and "position_ids" not in names:
            kwargs.pop("position_ids", None)
        output = super(_HeadBackbone, view).forward(**kwargs)  # type: ignore[misc]
        if cache is not None:
            cache.session.note_ids(*ids_and_mask)
        return output if prompt is None or not is_prompted else without_prompt(output, prompt.num_embeddings)


def _no_padding(cache: HeadCache, inputs: Mapping[str, Any]) -> Tensor:
    """What Transformers takes no mask for: no token is padding, of those either that the cache has."""
    tokens = inputs.get("input_ids")
    new = inputs["inputs_embeds"] if tokens is None else tokens
    return torch.ones(new.shape[0], cache.session.num_tokens + new.shape[1], dtype=torch.long, device=new.device)


def cache_name(parameters: Container[str]) -> str:
    """What a family with these parameters calls its cache."""
    return "cache_params" if "cache_params" in parameters else "past_key_values"


def _cache_of(arguments: Mapping[str, Any]) -> Any:
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def new_cache(blocks: Any, arguments: Mapping[str, Any], *, by_default: bool) -> HeadCache | None:
    """The cache of a call that was given none; None if it is to have none.

    A call goes on with the active session, unless it says that it uses no cache. One that says that it uses a cache
    opens a session. One that does not say gets a cache as in Transformers, but stays a single pass, of which there are
    gradients: its session is opened only if the cache is used.
    """
    use_cache = arguments.get("use_cache")
    is_said = use_cache is not None and use_cache is not UNSAID
    if is_said and not use_cache:
        return None
    if (session := blocks.active_session()) is not None:
        return HeadCache(session)
    if is_said:
        return HeadCache(blocks.new_session(batch_size=1, max_length=1))
    return HeadCache(NotBegun()) if by_default else None


def _check_length(mask_BS: Tensor, cache: HeadCache, inputs: Mapping[str, Any]) -> None:
    tokens = inputs.get("input_ids")
    num_new = (inputs["inputs_embeds"] if tokens is None else tokens).shape[1]
    if mask_BS.shape[1] != cache.session.num_tokens + num_new:
        raise UserError(
            f"a mask of {mask_BS.shape[1]} tokens for {num_new} tokens after the session's {cache.session.num_tokens}"
        )


class _Bounded:
    """Mixed into a candidate generator: Transformers' own may guess more tokens than the session may hold."""

    max_candidate_length: int

    def get_candidates(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        ids, logits = super().get_candidates(input_ids, *args, **kwargs)  # type: ignore[misc]
        num_tokens = input_ids.shape[1]
        num_candidates = max(0, self.max_candidate_length - num_tokens)
        return ids[:, : num_tokens + num_candidates], None if logits is None else logits[:, :num_candidates]


class _Head:
    """Mixed into a Transformers class: the same model, without its layers."""

    def __init__(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        _, backbone, layers_name = find_backbone(self, text_config(config))
        backbone._layers_name = layers_name
        backbone._layers_elsewhere = list(getattr(backbone, layers_name))
        setattr(backbone, layers_name, nn.ModuleList())
        backbone.__class__ = _subclass(_HeadBackbone, type(backbone))  # type: ignore[arg-type]
        self._backbone_of_head = [backbone]  # in a list, so that it is not registered as a second submodule

    def attach_blocks(self: Any, blocks: nn.Module) -> None:
        """Make `blocks` the model's layers."""
        setattr(self.backbone, self.backbone._layers_name, blocks)

    @property
    def backbone(self: Any) -> Any:
        """What surrounds the layers, and owns the soft prompt if there is one."""
        return self._backbone_of_head[0]

    @property
    def layers_elsewhere(self: Any) -> list[nn.Module]:
        """The layers as Transformers has built them, without weights."""
        found: list[nn.Module] = self.backbone._layers_elsewhere
        return found

    @property
    def blocks(self: Any) -> Any:
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
        """Open a session where Transformers would make a cache, under the name by which the family calls it."""
        name = cache_name(inspect.signature(self.forward).parameters)
        cache = model_kwargs.get(name)
        check_cache_choice(generation_config.cache_implementation, cache)
        if isinstance(cache, HeadCache):
            cache.session.expect(max_cache_length)
            if generation_mode == GenerationMode.ASSISTED_GENERATION:
                cache.session.crop(0)  # it begins with the whole prompt, whatever has been computed of it
        if generation_config.use_cache is False or cache is not None:
            return
        rows = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1) * batch_size
        model_kwargs[name] = HeadCache(self.blocks.new_session(batch_size=rows, max_length=max_cache_length))

    def _get_candidate_generator(self: Any, **arguments: Any) -> CandidateGenerator:
        """What guesses the next tokens in assisted decoding, never beyond the session's `max_length`."""
        generator: Any = super()._get_candidate_generator(**arguments)  # type: ignore[misc]
        generator.__class__ = _subclass(_Bounded, type(generator))  # type: ignore[arg-type]
        generator.max_candidate_length = _cache_of(arguments["model_kwargs"]).session.max_length
        return generator


def distributed_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of a client's half of a `cls`."""
    made = _subclass(_Head, cls)  # type: ignore[arg-type]
    if "forward" not in made.__dict__:
        made.forward = _noting_what_is_unsaid(cls.forward)
    return made


def _noting_what_is_unsaid(forward: Callable[..., Any]) -> Callable[..., Any]:
    names = list(inspect.signature(forward).parameters)

    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "use_cache" in names[len(args) + 1 :] and kwargs.get("use_cache") is None:
            kwargs["use_cache"] = UNSAID
        return forward(self, *args, **kwargs)

    return wrapper


@functools.cache
def _subclass(mixin: type, cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    # Transformers decides by a class's name and module (weight conversions, the loss, the cache): both are kept.
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
    """Build a client's half of a `cls` from a checkpoint's tensors, under the checkpoint's own names.

    `cls` is a class for the language model alone, if the checkpoint holds more: one for `text_config(config)`. Tensors
    of the blocks are ignored, and need not be there. Raises `CheckpointError` for a tensor that is missing or
    misshapen. Only the head of a task that the checkpoint was not trained for may be missing (the `score` of a sequence
    classifier); it is then initialized, and Transformers warns of it.
    """
    whole, config = config, text_config(config)
    if whole is not config and isinstance(whole, cls.config_class):
        raise UnsupportedModel(f"{cls.__name__} is more than a language model, which is all that a swarm can serve")
    names = {name: family.name_in_head(name) for name in state_dict}
    model, info = distributed_class(cls).from_pretrained(
        None,
        config=config,
        state_dict={new: state_dict[name] for name, new in names.items() if new is not None},
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, all of them, as our own error
    )
    missing = info["missing_keys"]
    if not isinstance(model, GenerationMixin) and model.base_model is not model:
        missing = [name for name in missing if name.startswith(f"{cls.base_model_prefix}.")]
    # a checkpoint may hold more than this class uses: another task's head, a vision tower
    check_loaded({**info, "missing_keys": missing, "unexpected_keys": ()})
    model.to(device)
    model.attach_blocks(blocks)
    return model
