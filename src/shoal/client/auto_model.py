"""How a distributed model is opened: `from_pretrained` of the auto classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Concatenate, ParamSpec

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from shoal.client.blocks import RemoteSequential
from shoal.client.by_code import open_by_code
from shoal.client.config_attributes import ConfigAttributes
from shoal.client.distributed_model import distributed
from shoal.client.generation.drafting.draft_models import DraftModels
from shoal.client.head.logits import RemoteHead
from shoal.client.head.projection import prepare_projection
from shoal.client.options.client_options import AUTO, INITIAL_PEERS, OFF, ClientOptions, ModelOptions
from shoal.client.options.model_checks import changed_config, check_encodings, check_pins, device_of, dtype_of
from shoal.client.options.peer_names import found_in_directory
from shoal.client.runtime import Runtime
from shoal.client.saving import versions_of
from shoal.client.shared_network import join_shared
from shoal.client.swarm.swarm import Swarm
from shoal.client.tuning import add_adapter, add_prompts
from shoal.errors import UnsupportedModel, UserError
from shoal.joining.invite_code import InviteCode, is_code
from shoal.ledgers.tabs import Tabs
from shoal.model.families import text_config
from shoal.model.head import build_head
from shoal.model.peft.peft_folder import PeftFolder
from shoal.model.peft.prompts import check_mode
from shoal.model.peft.skeleton import skeletons
from shoal.model.weights.checkpoint import Checkpoint
from shoal.model.weights.hub import HubFiles
from shoal.net.transport import Node
from shoal.peers import ModelInfo
from shoal.protocol import MAX_LENGTH
from shoal.spans import Span

P = ParamSpec("P")

GENERATION_CONFIG = "generation_config.json"


def _with_keywords_of(
    source: Callable[P, object],
) -> Callable[[Callable[..., Any]], Callable[Concatenate[Any, str | Path, P], Any]]:
    """Give a function the keywords of another, in its signature and for type checkers, so that one list is enough."""

    def decorate(function: Callable[..., Any]) -> Callable[Concatenate[Any, str | Path, P], Any]:
        own = [each for each in inspect.signature(function).parameters.values() if each.kind is not each.VAR_KEYWORD]
        signature = inspect.Signature([*own, *inspect.signature(source).parameters.values()], return_annotation=Any)
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return decorate


class _AutoDistributed:
    """What the `AutoDistributed...` classes share."""

    _auto_class: ClassVar[Any]

    def __init__(self) -> None:
        raise UserError(f"use {type(self).__name__}.from_pretrained(MODEL, initial_peers=[ADDRESS])")

    @classmethod
    @_with_keywords_of(ClientOptions.from_keywords)
    def from_pretrained(cls, model: str | Path, **keywords: Any) -> Any:
        """Join a swarm and load the parts of a model that are not blocks; returns the Transformers model.

        `model` is a Hugging Face id, a folder, or an invite code, which names the swarm too. What a keyword is left out
        for is its default.

        The swarm:

        - `initial_peers`: addresses that `shoal serve` prints, in a list, or in one string with spaces or commas
          between them. Default: `$SHOAL_INITIAL_PEERS`. Models of one process that name the same share one node.
        - `swarm_key`: the file with the key of a closed swarm. Default: `$SHOAL_SWARM_KEY`. An invite code has the key.
        - `allowed_servers`, `blocked_servers`: use these servers only, or all but these. A server is named by its peer
          id, by the end of the id, or by its name, as `shoal status` shows them. A name must be that of one server that
          is present now.
        - `pinned={"0:4": SERVER}`: let only that server compute these blocks.
        - `chooser`: how routes are chosen, "balanced" (the default), "shortest" or "nsga2" (`docs/routes.md`).
        - `patience`: for how many seconds a call waits for blocks that no server computes now: the last one is lost or
          busy, or others are still loading them. Default: 180. With 0 it fails at once. Blocks that no server has
          announced since the client came are not waited for.
        - `standby=True`: sessions keep a second server warm for each of theirs.
        - `draft`: "auto" (the default) guesses tokens of streams ahead where that is faster, which changes none;
          "off" does not. With "mtp", the checkpoint's own layers that predict further tokens guess too. With a small
          model of the same vocabulary, that does: a folder, an id on the hub, or a model that is loaded
          (`docs/speculation.md`).
        - `own_servers`: identity files of servers that you run (`shoal serve --identity`): servers that these have
          computed for serve you first when there is a queue (`docs/trust.md`). Default: those of this machine. "none"
          tells no server which ones are yours.
        - `audits`: how often what a server answers is computed again by others, to find servers that lie: "off", "low"
          (the default) or "high" (`docs/trust.md`).
        - `salt`: servers reuse cached prefixes among sessions with equal salts only. Default: a secret one for each
          model, so that others cannot learn from response times which prompts you have sent. With the same secret
          `salt`, several clients share prefixes with each other; with `salt=""`, with all who pass that.
        - `observers`: functions that are called with every event of this model, such as a chosen route or a lost
          server (`shoal.events`), each on a thread of its own.

        What is computed here, and how it travels:

        - `dtype`: what the client computes in and sends. Default: what the swarm computes in, or the model's dtype
          while it has no server. `device`: default "cpu"; "auto" is a GPU if there is one.
        - `wire`: the encoding of hidden states on the network. "auto" loses nothing, and packs them where that is
          faster; "raw" never packs; "bfloat16" and "int8" are smaller and lossy.
        - `history`: how inputs are kept so that a lost server can be replaced, "exact", or the smaller and lossy
          "bfloat16" or "int8", which may change what is generated after a failure. `history_memory`: the bytes that
          stay in memory, for all sessions together, by default all; the rest goes to an unnamed file in
          `history_folder`, by default the system's folder for temporary files.
        - `remote_head=True`: sessions end at a server that computes the output head (`shoal serve --serve-head`). The
          client reads its own head from the disk only if there is no such server. `head_top_k`: the server sends the
          logits of that many of the likeliest tokens, and all others are -inf.
        - `head_quantization`: "int8" or "nf4" for an output head here that is smaller and less precise than "none".

        What is trained, or was:

        - `tuning_mode="ptune"` with `pre_seq_len=N`: N trainable vectors before every text,
          `model.prompt_embeddings`. "deep_ptune" adds N more in every block (`docs/finetuning.md`). All other
          parameters are frozen, except the head of a task, such as a classifier's.
        - `active_adapter`: a PEFT adapter to compute with, a Hugging Face id or a folder. It is not sent to servers
          that host it.

        The checkpoint: `revision`, `token`, `cache_dir` and `local_files_only` as in Transformers;
        `allow_uncertified=True` opens a model of a family that was never checked.

        All other keywords change the model's config, such as `num_labels=3`, or are Transformers' and PETALS', which
        are taken, or refused with a hint (`shoal.client.options.keywords`). Call `close()` on the model to leave the
        swarm, or leave that to the end of the process.

        Raises `UserError` for what can never work, `BootstrapFailed` if none of the initial peers answers, and
        `SwarmError` if the swarm cannot be asked.
        """
        if is_code(str(model)):  # it names the swarm, and the environment may name another
            keywords.setdefault("initial_peers", ())
        options = ClientOptions.from_keywords(**keywords)
        if not options.initial_peers and not is_code(str(model)):
            raise UserError(
                "initial_peers is empty, so there is no swarm to join",
                hint=f"pass an address that shoal serve printed, or set {INITIAL_PEERS}",
            )
        return cls.from_options(model, options)

    @classmethod
    def from_options(cls, model: str | Path, options: ClientOptions) -> Any:
        """Open a model as `from_pretrained` does, from options that are complete and checked."""
        wanted = options.model
        adapter = _adapter_of(wanted)
        if is_code(str(model)):
            checkpoint, options, runtime, node = open_by_code(InviteCode.parse(str(model)), options)
        else:
            checkpoint = Checkpoint.open(
                model,
                revision=wanted.revision,
                token=wanted.token,
                cache_dir=wanted.cache_dir,
                allow_uncertified=wanted.allow_uncertified,
                local_files_only=wanted.local_files_only,
            )
            runtime, node = join_shared(options.network)
        try:
            return cls.from_checkpoint(checkpoint, node, runtime, options=options, adapter=adapter)
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
        options: ClientOptions,
        adapter: PeftFolder | None = None,
    ) -> Any:
        """Open a model on a node that runs on the runtime's loop. The model closes the runtime when it is closed.

        `adapter` is the opened `options.model.active_adapter`.
        """
        wanted = options.model
        known = inspect.signature(ClientOptions.from_keywords).parameters
        model_config = changed_config(text_config(checkpoint.config), wanted.config_changes, known)
        model_class = cls._class_for(model_config)
        check_mode(wanted.tuning_mode, wanted.pre_seq_len)
        check_pins(options, checkpoint.num_blocks)
        model_info = ModelInfo(checkpoint.key, checkpoint.name, checkpoint.family.model_type, checkpoint.num_blocks)
        with_whole_ids = partial(_with_whole_ids, runtime, node, model_info)
        options = with_whole_ids(options)
        swarm = Swarm(node, model_info, checkpoint.fingerprint, options)
        runtime.resources.push_async_callback(swarm.events.close)
        dtype = _chosen_dtype(wanted.dtype, model_config, swarm, runtime)
        check_encodings(options, checkpoint.family, dtype)
        blocks = RemoteSequential(
            runtime,
            swarm,
            Span(0, checkpoint.num_blocks),
            max_length=getattr(model_config, "max_position_embeddings", None) or MAX_LENGTH,
        )
        model = _built(distributed(model_class), checkpoint, model_config, blocks, options=options, dtype=dtype)
        sizes = [sum(weight.numel() for weight in layer.parameters()) for layer in model.meta_layers]
        swarm.tabs = Tabs(options.ledgers, node.transport.peer, sizes)
        if adapter is not None:
            add_adapter(model, adapter)
        if wanted.tuning_mode is not None:
            add_prompts(model, wanted.pre_seq_len, deep=wanted.tuning_mode == "deep_ptune")
        opened_with = {
            "initial_peers": list(options.initial_peers),
            "active_adapter": None if adapter is None else adapter.origin,
            "tuning_mode": wanted.tuning_mode,
            "pre_seq_len": wanted.pre_seq_len,
        }
        blocks.watch(ConfigAttributes(model.config, swarm, opened_with, with_whole_ids=with_whole_ids))
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


def _adapter_of(wanted: ModelOptions) -> PeftFolder | None:
    if wanted.active_adapter is None:
        return None
    return PeftFolder.open(
        wanted.active_adapter,
        token=wanted.token,
        cache_dir=wanted.cache_dir,
        local_files_only=wanted.local_files_only,
    )


def _with_whole_ids(runtime: Runtime, node: Node, model: ModelInfo, options: ClientOptions) -> ClientOptions:
    return runtime.run(found_in_directory(options, node, model))


def _chosen_dtype(
    dtype: torch.dtype | str, model_config: PreTrainedConfig, swarm: Swarm, runtime: Runtime
) -> torch.dtype:
    """What the client computes in; "auto" is what the swarm computes in."""
    chosen = dtype_of(dtype, model_config)
    if dtype != "auto":
        return chosen
    of_swarm = runtime.run(swarm.servers.dtype(own=str(chosen).removeprefix("torch.")))
    return dtype_of(of_swarm or chosen, model_config)


def _built(
    model_class: type[PreTrainedModel],
    checkpoint: Checkpoint,
    model_config: PreTrainedConfig,
    blocks: RemoteSequential,
    *,
    options: ClientOptions,
    dtype: torch.dtype,
) -> Any:
    """The Transformers model around the blocks, with its head and its generation config."""
    device = device_of(options.model.device)
    model: Any = build_head(
        model_class,
        checkpoint.family,
        model_config,
        checkpoint.head_tensors(),
        blocks=blocks,
        dtype=dtype,
        device=device,
    )
    blocks.mount(skeletons(model.meta_layers, torch.empty(0, dtype=dtype, device=device)))
    model.draft_models = DraftModels(model.config, checkpoint, options=options.model, dtype=dtype, device=device)
    if options.draft not in (AUTO, OFF):
        model.draft_models.drafter(model, options.draft)  # what is wrong with it is known before the first text
    model.name_or_path = model.config._name_or_path = checkpoint.files.origin  # PEFT writes it into its adapters
    if isinstance(checkpoint.files, HubFiles):
        model.config._commit_hash = checkpoint.files.commit  # other files have to be of it
    if GENERATION_CONFIG in checkpoint.files and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.files.path(GENERATION_CONFIG).parent)
    prepare_projection(model, quantization=options.model.head_quantization, remote=options.remote_head, dtype=dtype)
    if options.remote_head:
        model._remote_head = RemoteHead(model, top_k=options.head_top_k)
    return model


class AutoDistributedModel(_AutoDistributed):
    """`transformers.AutoModel` with its blocks on servers: it returns hidden states [B, T, D], without an output head.

    Open it with `from_pretrained`.
    """

    _auto_class = AutoModel


class AutoDistributedModelForCausalLM(_AutoDistributed):
    """`transformers.AutoModelForCausalLM` with its blocks on servers: it returns logits [B, T, V], and generates text.

    Open it with `from_pretrained`.
    """

    _auto_class = AutoModelForCausalLM


class AutoDistributedModelForSequenceClassification(_AutoDistributed):
    """`transformers.AutoModelForSequenceClassification` with its blocks on servers: it returns logits [B, num_labels].

    Open it with `from_pretrained`. If the checkpoint has no classification head, the client makes one to train.
    """

    _auto_class = AutoModelForSequenceClassification
