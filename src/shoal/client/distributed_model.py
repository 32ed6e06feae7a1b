"""What a distributed model can do beyond what its Transformers class can."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from shoal.client.active import active_session, none_active
from shoal.client.blocks import RemoteSequential
from shoal.client.continuation import Continuation
from shoal.client.generation.assisted import as_stream
from shoal.client.generation.drafting.draft_models import DraftModels
from shoal.client.generation.drafting.drafter import Drafter
from shoal.client.generation.generation_engine import GenerationEngine
from shoal.client.generation.preparing import prepared
from shoal.client.generation.token_stream import TokenStream
from shoal.client.generation.whole_texts import whole_texts
from shoal.client.head.logits import RemoteHead
from shoal.client.inference_session import InferenceSession, closing_new_sessions, note_opened
from shoal.client.saving import SavesTrained
from shoal.client.tuning import twin_with_adapter
from shoal.errors import SwarmError, UnsupportedOperation, UserError
from shoal.model.peft.peft_layers import check_peft_configs
from shoal.model.peft.prompts import PROMPT
from shoal.model.remote_cache import CACHE_NAMES, RemoteCache, cache_argument, cache_for_call

log = logging.getLogger(__name__)


class DistributedModel(SavesTrained):
    """Mixed into a Transformers model class: sessions, a remote head, PETALS' names, and `close()`."""

    blocks: RemoteSequential
    draft_models: DraftModels
    """The small models that guess for this one. Copies share them."""
    _remote_head: RemoteHead | None = None
    _engine: GenerationEngine | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._remote_head is not None:
            self._open_cache(args, kwargs)  # a server computes logits in a session only
        head_call = None if self._remote_head is None else self._remote_head.head_call(self, kwargs)
        if self._remote_head is None or head_call is None:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        view: Any = self._remote_head.view_of(self, head_call)  # type: ignore[type-var]
        with head_call:
            return head_call.finished(super(DistributedModel, view).__call__(*args, **kwargs))  # type: ignore[misc]

    def _open_cache(self: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Open the cache that the backbone would open a little later."""
        names = inspect.signature(self.forward).parameters
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if any(given.get(name) is not None for name in CACHE_NAMES):
            return
        if (cache := cache_for_call(self.blocks, given, by_default=False)) is not None:
            kwargs.update({"use_cache": True, cache_argument(names): cache})

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "peft_config":  # this is how PEFT says what it has added
            check_peft_configs(value)
        super().__setattr__(name, value)
        if name == "peft_config":
            self.blocks.note_adapters(value)
            try:
                self.blocks.measure_new()  # before the initial magnitudes of DoRA are saved or copied
            except SwarmError as error:
                log.warning("the magnitudes of DoRA are measured later: %s", error)

    @property
    def prompt_embeddings(self: Any) -> nn.Embedding:
        """The soft prompt, [P, D]. Raises `AttributeError` if the model was opened without a `tuning_mode`."""
        prompt: nn.Embedding | None = getattr(self.backbone, PROMPT, None)
        if prompt is None:
            raise AttributeError('this model has no soft prompt: open it with tuning_mode="ptune", pre_seq_len=16')
        return prompt

    @property
    def transformer(self: Any) -> Any:
        """The backbone by PETALS' name, in every family: `.h` are the blocks, `.word_embeddings` the embeddings."""
        own: nn.Module | None = self.__dict__["_modules"].get("transformer")
        return self.backbone if own is None else own

    def inference_session(self, *, max_length: int | None = None, batch_size: int = 1) -> InferenceSession:
        """A session, which is a cache on the servers: `with model.inference_session(max_length=512) as session`.

        Inside the `with` block, calls of `generate()` and of the model continue the session. `max_length` is in tokens;
        by default the session may get as long as the model allows. Raises `UserError` for a length or a batch beyond
        the protocol's limits.
        """
        return self.blocks.inference_session(max_length=max_length, batch_size=batch_size)

    def generate(self, inputs: Any = None, *args: Any, session: InferenceSession | None = None, **kwargs: Any) -> Any:
        """Transformers' `generate()`. With a `session` it continues where the session's last call ended.

        The same holds inside `with model.inference_session():`, unless the call has `past_key_values` or
        `use_cache=False`. In a session, `inputs` [B, T] are only the new tokens, or all tokens so far and the new ones,
        or `None` to continue without new ones. The returned sequences begin with what was passed.

        With a `draft`, steps carry guesses of the next tokens (`docs/speculation.md`), as those of `stream` do. Then
        each text is decoded by itself, greedily or by sampling, and the result is a tensor. An `assistant_model`
        becomes the draft, `prompt_lookup_num_tokens` a draft from what the text repeats, and `use_mtp` one of the
        checkpoint's own layers, where the call allows it; how many tokens are guessed is measured. Otherwise the first
        two are used in Transformers' own loop.

        Raises `UserError` for inputs that do not fit the session, or whose `max_new_tokens` do not, `MissingBlocks`
        when no server can take the place of a lost one, and `SwarmError` if the swarm cannot be asked.
        """
        if kwargs.get("draft") is not None:
            return self._generate_with_guesses(inputs, *args, session=session, **kwargs)
        kwargs.pop("draft", None)
        if not args and (options := as_stream(self, kwargs)) is not None:
            return self._generate_with_guesses(inputs, session=session, **options)
        if kwargs.get("use_mtp") or getattr(kwargs.get("generation_config"), "use_mtp", None):
            raise UnsupportedOperation(
                "with use_mtp, this call cannot be decoded",
                hint='pass use_mtp=True in the call, without beams and a cache; or use stream(draft="mtp")',
            )
        generate = super().generate  # type: ignore[misc]
        if self._remote_head is not None:
            self._remote_head.check_options(kwargs)
        has_cache = any(kwargs.get(name) is not None for name in CACHE_NAMES)
        uses_none = kwargs.get("use_cache") is False
        if session is not None and (has_cache or uses_none):
            raise UserError("a session is a cache: pass it alone, without past_key_values or use_cache=False")
        if session is None and not has_cache and not uses_none:
            session = active_session(self.blocks.owner)
        handed_out: list[InferenceSession] = []
        with none_active(), closing_new_sessions() as opened:
            if session is None:
                result = generate(inputs, *args, **kwargs)
            else:
                if inputs is None:
                    inputs = kwargs.pop("input_ids", None)
                continuation = Continuation.of(session, inputs, kwargs.pop("attention_mask", None))
                given = {"generation_config": args[0], **kwargs} if args else kwargs
                cache = continuation.cache(session, given)
                kwargs |= {"attention_mask": continuation.attention_mask, "past_key_values": cache}
                session.in_call = True
                try:
                    result = continuation.finish(session, generate(continuation.input_ids, *args, **kwargs))
                except BaseException:
                    continuation.abandon(session)
                    raise
            returned = next((each for name in CACHE_NAMES if (each := getattr(result, name, None)) is not None), None)
            if isinstance(returned, RemoteCache):
                handed_out = [each for each in opened if each is returned.session]
                opened[:] = [each for each in opened if each is not returned.session]
        for each in handed_out:
            note_opened(each)  # the caller owns it now, such as the `generate()` that this model assists
        return result

    def _generate_with_guesses(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            raise UserError("with a draft, generate() takes its options by name")
        ids_BS: torch.Tensor | None = kwargs.pop("input_ids", None) if inputs is None else inputs
        config = kwargs.get("generation_config") or self.generation_config
        pad = kwargs.get("pad_token_id", config.pad_token_id)
        if pad is None:
            ends = kwargs.get("eos_token_id", config.eos_token_id)
            pad = ends[0] if isinstance(ends, Sequence) else ends
        return whole_texts(self.stream, ids_BS, pad_token_id=0 if pad is None else int(pad), options=kwargs)

    def stream(
        self,
        inputs: Any = None,
        *,
        session: InferenceSession | None = None,
        seed: int | None = None,
        num_logprobs: int | None = None,
        salt: str | None = None,
        draft: str | Path | PreTrainedModel | Drafter | None = None,
        num_guesses: int | None = None,
        **options: Any,
    ) -> TokenStream:
        """The tokens of one text as they come: `async for token in model.stream(...)`, or `for token in ...`.

        The tokens are those of `generate()` with the same `inputs` [1, T] and the same options, after
        `torch.manual_seed(seed)` if they are sampled. All streams of a model are computed together, however many there
        are and whenever they begin. With a `session`, a stream continues it, as `generate()` does. Each token has its
        id (`shoal.client.generation`); with `num_logprobs`, also its log-probability and that many of the likeliest.
        With a `salt`, a stream without a session shares cached prefixes with streams of that salt, not with the model's
        other ones: for a caller who streams for several people.

        With `draft="auto"`, a step carries guesses of the next tokens where that is faster, which changes no token
        (`docs/speculation.md`); with "off", none. With "mtp", layers of the checkpoint guess too. With a small model,
        that does: a folder, an id on the hub, or a model that is loaded. The default is what the model was opened with.
        A `Drafter` of your own may guess instead. `num_guesses` fixes how many a step carries, at most 64.

        Close the stream, or leave its `with` block, to stop: the servers then forget it at once. Raises `UserError` and
        `UnsupportedOperation` for what only `generate()` can do, such as beams; errors of the swarm come out of the
        iteration.
        """
        generate = super().generate  # type: ignore[misc]
        if self._remote_head is not None:
            self._remote_head.check_options(options)
        session = active_session(self.blocks.owner) if session is None else session
        with none_active(), closing_new_sessions() as opened:
            if salt is not None:
                if session is not None:
                    raise UserError("a session has a salt already", hint="leave out salt=, or session=")
                own = self.blocks.new_session(batch_size=1, max_length=1, salt=salt)  # it is told how long it gets
                options[cache_argument(inspect.signature(cast(Any, self).forward).parameters)] = RemoteCache(own)
            generation = prepared(
                self,
                generate,
                inputs,
                session=session,
                seed=seed,
                num_logprobs=num_logprobs,
                draft=self.blocks.swarm.config.draft if draft is None else draft,
                num_guesses=num_guesses,
                options=options,
            )
            opened[:] = [each for each in opened if each is not generation.session]
        return self._started_engine().stream(generation)

    def _started_engine(self) -> GenerationEngine:
        """The engine of this model's streams, which the first stream starts."""
        runtime = self.blocks.runtime

        async def start() -> GenerationEngine:
            if self._engine is None:  # on the loop, one call comes after another
                self._engine = GenerationEngine(runtime)
                await runtime.resources.enter_async_context(self._engine)
            return self._engine

        return runtime.run(start())

    def with_adapter(self, adapter: str | Path, **where: Any) -> Self:
        """Another model that computes with this PEFT adapter, a folder or a Hugging Face id.

        It shares the weights of this one and its connections, so that one process can have many. Both are used, and
        closed, independently. `where` may have `revision`, `token`, `cache_dir` and `local_files_only`. Raises
        `UserError` if the adapter does not fit.
        """
        return cast(Self, twin_with_adapter(self, adapter, **where))

    def close(self) -> None:
        """Leave the swarm. The model cannot be used any more; its copies can. May be called twice."""
        self.blocks.close()


def distributed(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The distributed subclass of a model class. Transformers decides by name and module, so they stay."""
    return type(model_class.__name__, (DistributedModel, model_class), {"__module__": model_class.__module__})
