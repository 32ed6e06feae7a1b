"""A model's checkpoint: tensors are found by the headers of their files, and read only by those that need them.

A server reads the tensors of its blocks; a client reads all others. From the hub, only the files with these tensors are
downloaded. Only safetensors files are read, because unpickling an older checkpoint runs code from it.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from shoal.errors import CheckpointError, UnsupportedModel, UserError
from shoal.model.families import Family, family_of, text_config
from shoal.model.weights.contents import check_blocks, find_files, locate_tensors, read_json
from shoal.model.weights.files import Files
from shoal.model.weights.fingerprint import fingerprint, model_key
from shoal.model.weights.location import CONFIG, missing_config
from shoal.model.weights.safetensors_file import TensorInfo
from shoal.spans import Span


@dataclass(frozen=True)
class Checkpoint:
    """A model that can be loaded: its config, the sizes of its blocks, and the file of each tensor."""

    files: Files
    config: PreTrainedConfig
    family: Family
    key: str  # the swarm's name for the model, equal for its copies and revisions
    file_of: Mapping[str, str] = field(repr=False)  # tensor -> file

    @classmethod
    def open(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        allow_uncertified: bool = False,
        local_files_only: bool = False,
    ) -> Checkpoint:
        """Open a local folder or a model on the hub, without reading any weights.

        Raises `UserError` if there is no such model, `UnsupportedModel` if it cannot be cut into blocks, and
        `CheckpointError` if its config or its list of files is damaged.
        """
        files = find_files(
            model, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        if CONFIG not in files:
            raise missing_config(model, files.listing())
        return cls.of(files, allow_uncertified=allow_uncertified)

    @classmethod
    def of(cls, files: Files, *, allow_uncertified: bool = False) -> Checkpoint:
        """The model that these files describe. Raises what `open` raises."""
        description = read_json(files, CONFIG)
        config = _read_config(files)
        family = family_of(config, allow_uncertified=allow_uncertified)
        key = model_key(description, num_blocks=family.num_blocks, hidden_size=text_config(config).hidden_size)
        file_of = locate_tensors(files)
        check_blocks(files.name, family.num_blocks, {family.block_of(name) for name in file_of})
        return cls(files, config, family, key, file_of)

    @property
    def name(self) -> str:
        """A short name to show: that of the folder, or the id on the hub."""
        return self.files.name

    @property
    def num_blocks(self) -> int:
        """The number of blocks of the whole model."""
        return self.family.num_blocks

    @cached_property
    def fingerprint(self) -> str:
        """The name of these exact weights (`shoal.model.weights.fingerprint`).

        For a local folder this reads all weights, which may take minutes. Raises `CheckpointError` for a folder that
        lacks some of the files.
        """
        return fingerprint(self.key, self.files.digests(self.weight_files))

    @cached_property
    def block_bytes(self) -> tuple[int, ...]:
        """The size in bytes of each block's tensors as they are stored."""
        return self.block_sizes(lambda name, tensor: tensor.nbytes)

    def block_sizes(self, size_of: Callable[[str, TensorInfo], float]) -> tuple[int, ...]:
        """The size of each block if its tensors are held in another form.

        `size_of` gives the size in bytes of one tensor, from its name in the checkpoint and its header.
        """
        sizes = [0.0] * self.num_blocks
        for name, tensor in self._headers.items():
            if (block := self.family.block_of(name)) is not None and block < self.num_blocks:
                sizes[block] += size_of(name, tensor)
        return tuple(map(round, sizes))

    def blocks_on_disk(self) -> list[int]:
        """The blocks all of whose tensors are on this machine now."""
        names_in: dict[tuple[int, str], list[str]] = {}
        for name, file in self.file_of.items():
            if (block := self.family.block_of(name)) is not None:
                names_in.setdefault((block, file), []).append(name)
        missing = {block for (block, file), names in names_in.items() if not self.files.has_tensors(file, names)}
        return [block for block in range(self.num_blocks) if block not in missing]

    @cached_property
    def head_bytes(self) -> int:
        """The size in bytes of all tensors outside of the blocks as they are stored."""
        return self.head_size(lambda tensor: tensor.nbytes)

    def head_size(self, size_of: Callable[[TensorInfo], float]) -> int:
        """The size of all tensors outside of the blocks if they are held in another form.

        `size_of` gives the size in bytes of one tensor, from its header.
        """
        of_head = (tensor for name, tensor in self._headers.items() if self._is_of_head(name))
        return round(sum(map(size_of, of_head)))

    def block_tensors(self, span: Span) -> dict[str, Tensor]:
        """The tensors of these blocks, by their names in the checkpoint.

        They are mapped into memory (`shoal.model.weights.safetensors_file.read_tensors`). Missing files are downloaded.
        Raises `UserError` for a span beyond the model, and `CheckpointError` for a damaged file.
        """
        if span.end > self.num_blocks:
            raise UserError(f"{self.name} has {self.num_blocks} blocks; there is no span {span} of them")
        return self._read(
            name for name in self.file_of if (block := self.family.block_of(name)) is not None and block in span
        )

    def read_ahead(self, span: Span) -> None:
        """Read the tensors of these blocks, so that loading them soon afterwards does not wait for the disk or the hub.

        Raises what `block_tensors` raises.
        """
        for tensor in self.block_tensors(span).values():
            tensor.flatten().view(torch.uint8)[:: mmap.PAGESIZE].sum()  # touches each page

    def head_tensors(self) -> dict[str, Tensor]:
        """All tensors outside of the blocks that the model itself has, read in the same way.

        If the output head is tied to the embeddings, the checkpoint has only one of them.
        """
        return self._read(name for name in self.file_of if self._is_of_head(name))

    def prediction_tensors(self) -> dict[str, Tensor]:
        """All tensors of layers that predict further tokens, read in the same way; none if there are no such layers.

        They are numbered behind the blocks, or named `mtp`.
        """
        return self._read(name for name in self.file_of if self._is_prediction(name))

    def _is_of_head(self, name: str) -> bool:
        return self.family.block_of(name) is None and not self._is_prediction(name)

    def _is_prediction(self, name: str) -> bool:
        block = self.family.block_of(name)
        return name.startswith("mtp.") if block is None else block >= self.num_blocks

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        names_in: dict[str, list[str]] = {}
        for name in names:
            names_in.setdefault(self.file_of[name], []).append(name)
        return self.files.tensors(dict(sorted(names_in.items())))

    @property
    def weight_files(self) -> list[str]:
        """The files with its tensors."""
        return sorted(set(self.file_of.values()))

    @cached_property
    def _headers(self) -> Mapping[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for file, header in self.files.headers(self.weight_files).items():
            tensors |= {name: tensor for name, tensor in header.items() if self.file_of.get(name) == file}
        return tensors


def _read_config(files: Files) -> PreTrainedConfig:
    folder = files.path(CONFIG).parent
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if not isinstance(text_config(config).dtype, torch.dtype | None):
            raise TypeError("its dtype is the name of none")
        return config
    except ValueError as error:
        raise UnsupportedModel(
            f"Transformers does not know the architecture of {files.name}: {_in_one_line(error)}",
            hint="shoal never runs code that comes with a model",
        ) from error
    except (StrictDataclassError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{CONFIG} of {files.name} describes no model: {_in_one_line(error)}") from error


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
