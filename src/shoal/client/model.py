"""The public face: Transformers' models, with their blocks in the swarm."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from shoal.client.active import active_session, none_active
from shoal.client.blocks import RemoteBlocks
from shoal.client.continuation import Continuation
from shoal.client.head.logits import RemoteHead
from shoal.client.head.projection import prepare_projection
from shoal.client.inference_session import InferenceSession, closing_new_sessions, note_opened
from shoal.client.options.client_config import ClientConfig, chooser_of, peers_of, pins_of, salt_of
from shoal.client.options.config_attributes import ConfigAttributes
from shoal.client.options.keywords import resolve
from shoal.client.options.peer_names import found_in_directory
from shoal.client.options.requested_options import (
    addresses_of,
    changed_config,
    check_encoding,
    check_pins,
    check_top_k,
    device_of,
    dtype_of,
    encoding_of,
    history_encoding_of,
)
from shoal.client.runtime import Runtime
from shoal.client.saving import SavesTrained, versions_of
from shoal.client.swarm.swarm import Swarm
from shoal.client.tuning import add_adapter, add_prompts
from shoal.errors import SwarmError, UnsupportedModel, UserError
from shoal.model.families import text_config
from shoal.model.head import build_head
from shoal.model.peft.peft_folder import PeftFolder
from shoal.model.peft.peft_layers import check_peft_configs
from shoal.model.peft.prompts import PROMPT, check_mode
from shoal.model.peft.skeleton import skeletons
from shoal.model.remote_cache import CACHE_NAMES, RemoteCache, cache_argument, cache_for_call
from shoal.model.weights.checkpoint import Checkpoint
from shoal.net import NetworkConfig, join
from shoal.net.transport import Node
from shoal.peers import ModelInfo
from shoal.protocol import MAX_LENGTH
from shoal.spans import Span

log = logging.getLogger(__name__)

INITIAL_PEERS = "SHOAL_INITIAL_PEERS"
GENERATION_CONFIG = "generation_config.json"


class _AutoDistributed:
    """What the `AutoDistributed...` classes share."""

    _auto_class: ClassVar[Any]

    def __init__(self) -> None:
        raise UserError(f"use {type(self).__name__}.from_pretrained(MODEL, initial_peers=[ADDRESS])")

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        initial_peers: str | Sequence[str] | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
        allowed_servers: Sequence[str] | None = None,
        blocked_servers: Sequence[str] | None = None,
        pinned: Mapping[str, str] | None = None,
        chooser: str = "shortest",
        wire: str = "auto",
        standby: bool = False,
        history: str = "exact",
        history_memory: int | None = None,
        history_folder: str | Path | None = None,
        remote_head: bool = False,
        head_top_k: int | None = None,
        head_quantization: str = "none",
        tuning_mode: str | None = None,
        pre_seq_len: int = 0,
        active_adapter: str | Path | None = None,
        salt: str = "",
        allow_uncertified: bool = False,
        local_files_only: bool = False,
        **others: Any,
    ) -> Any:
        """Join a swarm and load what of the model is not blocks: the Transformers model, ready to be used as always.

        `model` is a Hugging Face id or a folder; `initial_peers` are addresses as `shoal serve` prints them, in a list
        or in one string (by default those in $SHOAL_INITIAL_PEERS). `pinned={"0:4": PEER}` has these blocks computed by
        that server and no other; `chooser` says how the others are chosen, "shortest" or "nsga2" (`shoal.routing`).
        Here, in `allowed_servers` and in `blocked_servers` a peer is a whole id, the end of one, or a server's name, as
        `shoal status` shows them; the last two are looked up once, now, and have to name one server that is there.
        `dtype` is what this side computes and sends in, by default what the servers compute in
        (`shoal.policy.dtypes`), or the model's own dtype if there is none yet; `wire` is how that travels: "raw" as it
        is, which "auto" means too, "bfloat16" or "int8" in fewer bytes and less precisely.

        What servers were sent is kept, so that others can take their place: `history` is how, "exact" or, less
        precisely, "bfloat16" or "int8", which may change what is generated after a failure. `history_memory` bytes of
        it, of all sessions together, stay in memory, by default all; the rest is in a file without a name in
        `history_folder`, by default where temporary files are.

        With `standby`, sessions keep a second server warm for each that they are on. With `remote_head`, sessions end
        at a server that computes the output head as well (`--serve-head`), and this side reads it from disk only if
        there is none; with `head_top_k` such a server sends the logits of so many of the likeliest tokens, and whoever
        looks further finds -inf. `head_quantization` is for the output head on this side: "int8" or "nf4" take less
        memory and are less precise than "none".

        With `tuning_mode="ptune"`, `pre_seq_len` trainable vectors stand before every text: `model.prompt_embeddings`;
        with "deep_ptune", as many are added in every block too (`docs/finetuning.md`). All else is then frozen, but
        for the head of a task, such as a classifier's. `active_adapter` is a PEFT adapter, a Hugging Face id or a
        folder, to compute with; servers that host it are not sent it.

        Servers compute once what several sessions begin with, of whoever has the same `salt`: with one of your own,
        nobody can find out by the time that it takes what you have asked.

        With `local_files_only`, nothing is downloaded. Other keyword arguments change the model's config, such as
        `num_labels=3`; those of Transformers and PETALS are taken, or refused with a hint
        (`shoal.client.options.keywords`). Call `close()` on the model, or leave it to the end of the process.

        Raises `UserError`s for what can never work and `BootstrapFailed` if none of the peers answers.
        """
        keywords = resolve(others, {"dtype": dtype, "device": device, "token": token})
        token = keywords.own["token"]
        checkpoint = Checkpoint.open(
            model,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            allow_uncertified=allow_uncertified,
            local_files_only=local_files_only,
        )
        peers = addresses_of(os.environ.get(INITIAL_PEERS, "") if initial_peers is None else initial_peers)
        if not peers:
            raise UserError(
                "which swarm? initial_peers is empty",
                hint=f"pass an address that shoal serve printed, or set {INITIAL_PEERS}",
            )
        config = ClientConfig(
            allowed_servers=None if allowed_servers is None else peers_of(allowed_servers),
            blocked_servers=peers_of(blocked_servers or ()),
            pinned=pins_of(pinned or {}),
            chooser=chooser_of(chooser),
            wire=encoding_of(wire),
            standby=standby,
            history=history_encoding_of(history),
            history_memory=history_memory,
            history_folder=None if history_folder is None else Path(history_folder).expanduser(),
            remote_head=remote_head,
            head_top_k=head_top_k,
            salt=salt_of(salt),
        )
        adapter = None
        if active_adapter is not None:
            adapter = PeftFolder.open(
                active_adapter, token=token, cache_dir=cache_dir, local_files_only=local_files_only
            )
        runtime = Runtime()
        try:
            network = join(NetworkConfig(initial_peers=peers, client_mode=True))
            node = runtime.run(runtime.resources.enter_async_context(network))
            return cls.from_checkpoint(
                checkpoint,
                node,
                runtime,
                config=config,
                initial_peers=peers,
                dtype=keywords.own["dtype"],
                device=device_of(keywords.own["device"]),
                head_quantization=head_quantization,
                tuning_mode=tuning_mode,
                pre_seq_len=pre_seq_len,
                active_adapter=adapter,
                **keywords.config_changes,
            )
        except BaseException:
            runtime.close()
            raise

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        node: Node,
        runtime: Runtime,
        *,
        config: ClientConfig,
        initial_peers: Sequence[str] = (),
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
        head_quantization: str = "none",
        tuning_mode: str | None = None,
        pre_seq_len: int = 0,
        active_adapter: PeftFolder | None = None,
        **config_changes: Any,
    ) -> Any:
        """The same on a network that is there already; the model closes `runtime` when it is closed."""
        known = inspect.signature(cls.from_pretrained).parameters
        model_config = changed_config(text_config(checkpoint.config), config_changes, known)
        model_class = cls._class_for(model_config)
        check_top_k(config)
        check_mode(tuning_mode, pre_seq_len)
        check_pins(config, checkpoint.num_blocks)
        model_info = ModelInfo(checkpoint.key, checkpoint.name, checkpoint.family.model_type, checkpoint.num_blocks)
        config = runtime.run(found_in_directory(config, node, model_info))
        swarm = Swarm(node, model_info, checkpoint.fingerprint, config)
        chosen_dtype = dtype_of(dtype, model_config)
        if dtype == "auto":
            of_swarm = runtime.run(swarm.dtype(own=str(chosen_dtype).removeprefix("torch.")))
            chosen_dtype = dtype_of(of_swarm or chosen_dtype, model_config)
        check_encoding(config.wire, checkpoint.family, chosen_dtype, "travel in")
        check_encoding(config.history, checkpoint.family, chosen_dtype, "are kept as")
        blocks = RemoteBlocks(
            runtime,
            swarm,
            Span(0, checkpoint.num_blocks),
            max_length=getattr(model_config, "max_position_embeddings", None) or MAX_LENGTH,
        )
        model = build_head(
            _with_swarm(model_class),
            checkpoint.family,
            model_config,
            checkpoint.head_tensors(),
            blocks=blocks,
            dtype=chosen_dtype,
            device=device,
        )
        blocks.mount(skeletons(model.meta_layers, torch.empty(0, dtype=chosen_dtype, device=device)))
        model.name_or_path = model.config._name_or_path = checkpoint.files.origin  # PEFT writes it into its adapters
        if GENERATION_CONFIG in checkpoint.files and model.can_generate():
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.files.path(GENERATION_CONFIG).parent)
        prepare_projection(model, quantization=head_quantization, remote=config.remote_head, dtype=chosen_dtype)
        if config.remote_head:
            model._remote_head = RemoteHead(model, top_k=config.head_top_k)
        if active_adapter is not None:
            add_adapter(model, active_adapter)
        if tuning_mode is not None:
            add_prompts(model, pre_seq_len, deep=tuning_mode == "deep_ptune")
        opened_with = {
            "initial_peers": list(initial_peers),
            "active_adapter": None if active_adapter is None else active_adapter.origin,
            "tuning_mode": tuning_mode,
            "pre_seq_len": pre_seq_len,
        }
        blocks.watch(
            ConfigAttributes(
                model.config,
                swarm,
                opened_with,
                with_whole_ids=lambda wanted: runtime.run(found_in_directory(wanted, node, model_info)),
            )
        )
        model._as_opened = versions_of(model)
        return model.eval()

    @classmethod
    def _class_for(cls, config: PreTrainedConfig) -> type[PreTrainedModel]:
        try:
            found = cls._auto_class._model_mapping[type(config)]
        except KeyError:
            raise UnsupportedModel(
                f"Transformers has no {cls._auto_class.__name__} for {config.model_type!r}"
            ) from None
        model_class: type[PreTrainedModel] = found[0] if isinstance(found, tuple | list) else found
        return model_class


class AutoDistributedModel(_AutoDistributed):
    """`transformers.AutoModel`, its blocks in the swarm: hidden states without an output head."""

    _auto_class = AutoModel


class AutoDistributedModelForCausalLM(_AutoDistributed):
    """`transformers.AutoModelForCausalLM`, its blocks in the swarm."""

    _auto_class = AutoModelForCausalLM


class AutoDistributedModelForSequenceClassification(_AutoDistributed):
    """`transformers.AutoModelForSequenceClassification`, its blocks in the swarm.

    The classification head is yours to train if the checkpoint has none.
    """

    _auto_class = AutoModelForSequenceClassification


class _InSwarm(SavesTrained):
    """Mixed into the model's class: what a distributed model can do beyond what Transformers' can."""

    blocks: RemoteBlocks
    _remote_head: RemoteHead | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._remote_head is not None:
            self._open_cache(args, kwargs)  # a server is asked for logits of a session, so that has to be there
        head_call = None if self._remote_head is None else self._remote_head.head_call(self, kwargs)
        if self._remote_head is None or head_call is None:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        view: Any = self._remote_head.view_of(self, head_call)  # type: ignore[type-var]
        with head_call:
            return head_call.finished(super(_InSwarm, view).__call__(*args, **kwargs))  # type: ignore[misc]

    def _open_cache(self: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Do here what the backbone would do a little later."""
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
                self.blocks.measure_new()  # before somebody saves or copies what DoRA begins with
            except SwarmError as error:
                log.warning("the magnitudes of DoRA are measured later: %s", error)

    @property
    def prompt_embeddings(self: Any) -> nn.Embedding:
        """The soft prompt (`tuning_mode`)."""
        prompt: nn.Embedding | None = getattr(self.backbone, PROMPT, None)
        if prompt is None:
            raise AttributeError('this model has no soft prompt: tuning_mode="ptune", pre_seq_len=16 gives it one')
        return prompt

    @property
    def transformer(self: Any) -> Any:
        """What surrounds the blocks, whatever the family calls it: `.h` are the blocks, `.word_embeddings` theirs."""
        own: nn.Module | None = self.__dict__["_modules"].get("transformer")
        return self.backbone if own is None else own

    def inference_session(self, *, max_length: int | None = None, batch_size: int = 1) -> InferenceSession:
        """A cache in the swarm that several calls share: `with model.inference_session(max_length=512) as session`.

        Inside of the `with` block, calls of `generate()` and of the model go on with it by themselves. Without
        `max_length` it may get as long as the model allows.
        """
        return self.blocks.inference_session(max_length=max_length, batch_size=batch_size)

    def generate(self, inputs: Any = None, *args: Any, session: InferenceSession | None = None, **kwargs: Any) -> Any:
        """Transformers' `generate`, which see; with `session`, it goes on where the session's last call ended.

        So it does inside of `with model.inference_session():`, unless it is given a cache or told to use none. Then
        `inputs` are the new tokens only, or everything so far and the new tokens, or nothing: just go on. What is
        returned begins with what was passed.
        """
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
                session.in_call = True
                kwargs |= {"attention_mask": continuation.attention_mask, "past_key_values": RemoteCache(session)}
                result = generate(continuation.input_ids, *args, **kwargs)
                result = continuation.finish(session, result)
            cache = next((each for name in CACHE_NAMES if (each := getattr(result, name, None)) is not None), None)
            if isinstance(cache, RemoteCache):
                handed_out = [each for each in opened if each is cache.session]
                opened[:] = [each for each in opened if each is not cache.session]
        for each in handed_out:
            note_opened(each)  # whoever has called has it now: perhaps another `generate()`, to which we only assist
        return result

    def close(self) -> None:
        """Leave the swarm. The model is of no more use. May be called twice."""
        self.blocks.close()


def _with_swarm(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of the same name and module, by which Transformers decides much."""
    return type(model_class.__name__, (_InSwarm, model_class), {"__module__": model_class.__module__})
