"""The small models that guess for one distributed model: they are opened once, and checked to know the same tokens.

Guesses are tokens, and a text is given as tokens. So both models have to mean the same by each: their tokenizers have
equal vocabularies. Where one of the two has none to compare, the sizes of their vocabularies have to be equal. With
equal tokenizers they may differ, as Qwen's do: embeddings are often padded to a round number.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from shoal.client.blocks import RemoteSequential
from shoal.client.generation.drafting.model_drafter import DraftModel, ModelDrafter
from shoal.client.generation.drafting.mtp_drafter import MtpDrafter
from shoal.client.generation.drafting.mtp_layers import MtpLayers
from shoal.client.options.client_options import MTP, ModelOptions
from shoal.errors import CheckpointError, UnsupportedOperation, UserError
from shoal.model.weights.checkpoint import Checkpoint
from shoal.model.weights.completeness import check_loaded
from shoal.model.weights.files import Files
from shoal.model.weights.location import INDEX

TOKENIZER = "tokenizer.json"


class DraftModels:
    """Opens drafts for one model, which `config` and `checkpoint` describe. Copies of the model share it.

    A draft that is named is read once, to `device` and in `dtype`, with the `options` of the model where they say how
    the hub is asked. It is read as any weights are: from safetensors files, and without code that comes with it.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        checkpoint: Checkpoint,
        *,
        options: ModelOptions,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self._vocab_size: int = config.get_text_config(decoder=True).vocab_size
        self._checkpoint, self._files = checkpoint, checkpoint.files
        self._options = options
        self._dtype, self._device = dtype, device
        self._opened: dict[str, DraftModel] = {}
        self._loaded: DraftModel | None = None  # the last one that a caller had loaded
        self._own: MtpLayers | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> DraftModels:
        """Weights are not copied."""
        return self

    def drafter(self, model: Any, named: str | Path | PreTrainedModel) -> MtpDrafter | ModelDrafter:
        """A drafter for one text: of the `model`'s own layers if "mtp" is `named`, else of a draft.

        Raises what `own_layers` and `draft` raise.
        """
        return MtpDrafter(self.own_layers(model)) if named == MTP else ModelDrafter(self.draft(named))

    def draft(self, named: str | Path | PreTrainedModel) -> DraftModel:
        """A draft by the folder or the id on the hub that it is in, or one that the caller has loaded.

        Raises `UserError` if it has another vocabulary, `UnsupportedOperation` for a model that cannot take back what
        it has read, and what opening a checkpoint raises.
        """
        if not isinstance(named, str | Path):
            if not isinstance(named, PreTrainedModel):
                raise UserError(
                    f"{named!r} is not a way to guess tokens",
                    hint='draft= is "auto", "mtp", "off", or a model: a folder, an id on the hub, or a loaded one',
                )
            if is_distributed(named):
                raise UnsupportedOperation(
                    "a model whose blocks are on servers does not guess: each guess would take a step",
                    hint="pass it as assistant_model= of generate(), or a model that is loaded here as draft=",
                )
            if self._loaded is None or self._loaded.model is not named:
                self.check_config(named.config, named.name_or_path or type(named).__name__)
                self._check_rewinds(named)
                self._loaded = DraftModel(named, num_words=self._vocab_size)
            return self._loaded
        if (found := self._opened.get(str(named))) is None:
            found = self._opened[str(named)] = self._open(named)
        return found

    def own_layers(self, model: Any) -> MtpLayers:
        """The layers of the model's own checkpoint that predict further tokens, read once.

        Raises `UnsupportedOperation` if there are none, or if a server computes the head, and what reading them raises.
        """
        if model._remote_head is not None:
            raise UnsupportedOperation(
                "a model's own layers cannot guess where a server computes the head: they need what comes before it",
                hint="open the model without remote_head, or with another draft",
            )
        if self._own is None:
            self._own = MtpLayers.open(model, self._checkpoint)
        return self._own

    def check_config(self, config: PreTrainedConfig, name: str) -> None:
        """Raises `UserError` if a draft with this config has a vocabulary of another size."""
        size = config.get_text_config(decoder=True).vocab_size
        if size != self._vocab_size:
            raise UserError(
                f"{name} cannot guess for {self._files.name}: it has {size} tokens in its vocabulary, and the model "
                f"has {self._vocab_size}",
                hint="use a smaller model of the same family, which has the same tokenizer",
            )

    def _open(self, named: str | Path) -> DraftModel:
        wanted = self._options
        checkpoint = Checkpoint.open(
            named,
            token=wanted.token,
            cache_dir=wanted.cache_dir,
            allow_uncertified=True,  # no server computes it
            local_files_only=wanted.local_files_only,
        )
        if not self._has_same_tokenizer(checkpoint.files):
            self.check_config(checkpoint.config, checkpoint.name)
        model = _loaded(checkpoint, self._dtype)
        self._check_rewinds(model)
        return DraftModel(model.to(self._device).eval(), num_words=self._vocab_size)

    def _has_same_tokenizer(self, files: Files) -> bool:
        """Whether it is known that both have equal tokenizers. Raises `UserError` if they have different ones."""
        if TOKENIZER not in files or TOKENIZER not in self._files:
            return False
        own, other = self._files.path(TOKENIZER), files.path(TOKENIZER)
        if own.read_bytes() != other.read_bytes() and _vocabulary(own, self._files) != _vocabulary(other, files):
            raise UserError(
                f"{files.name} cannot guess for {self._files.name}: their tokenizers differ",
                hint="use a smaller model of the same family, which has the same tokenizer",
            )
        return True

    @staticmethod
    def _check_rewinds(model: Any) -> None:
        if model._is_stateful:
            raise UnsupportedOperation(
                f"a {model.config.model_type} model cannot guess: it cannot take back what it has read",
                hint="use a model with attention in all layers",
            )


def is_distributed(model: Any) -> bool:
    """Whether the blocks of a model are on servers."""
    return isinstance(getattr(model, "blocks", None), RemoteSequential)


def _loaded(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model. Raises `CheckpointError` for weights that are missing or have another shape."""
    files = checkpoint.files
    paths = [files.path(name) for name in (*checkpoint.weight_files, *([INDEX] if INDEX in files else []))]
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            paths[0].parent,
            config=checkpoint.config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_loaded reports them
        )
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{checkpoint.name} cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    check_loaded({**info, "unexpected_keys": ()})  # a checkpoint may hold more, such as a vision tower
    return model


def _vocabulary(path: Path, files: Files) -> dict[str, int]:
    try:
        found: dict[str, int] = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises nothing more specific
        raise CheckpointError(f"{TOKENIZER} of {files.name} is damaged: {str(error)[:200]}") from error
    return found
