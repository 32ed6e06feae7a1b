"""What a checkpoint consists of, by its config and the headers of its weights: where each tensor is, and what it takes.

No weights are read or downloaded for it, and nothing slow is imported: `shoal plan` asks here what a model would take.
`shoal.model.weights.checkpoint` knows more, from the model's own class.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from shoal.errors import CheckpointError, UnsupportedModel
from shoal.model.family_tables import (
    CERTIFIED,
    CERTIFIED_WITH_VISION,
    DEQUANTIZED_ON_CPU,
    LINEARS_READ_DIRECTLY,
    OWN_LINEARS,
    uncertified,
)
from shoal.model.weights.files import Files, LocalFiles
from shoal.model.weights.fingerprint import fingerprint, model_key
from shoal.model.weights.location import CONFIG, INDEX, SINGLE_FILE, folder_of, missing_config, unreadable_weights
from shoal.model.weights.safetensors_file import DTYPE_BITS, TensorInfo, is_tensor_name

ITEM_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""The bytes of a number in each dtype that can be computed in."""
QUANTIZED_BYTES: Mapping[str, float] = {"int8": 1.01, "nf4": 0.5 + 4 / 64}
"""The bytes of a weight of a quantized linear layer, with scales: one for each row (int8) or 64 weights (NF4)."""
MOST_NUMBER = 1 << 31
"""No size that a config states is as large."""
_UNREADABLE = (".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".ckpt")
_NUMBERED = re.compile(r"(?:(.*?)\.)??(\w+)\.(\d{1,6})\.(.+)", re.DOTALL)
_NOT_LINEAR = frozenset({"experts", "gate", "router"})
_BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "experts_top_k", "num_selects")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def held_bytes(tensor: TensorInfo, *, itemsize: int, quantization: str = "none") -> float:
    """The bytes that a tensor of a checkpoint takes in memory.

    A number takes `itemsize` bytes there, whatever it takes in its file, unless the tensor is held in a `quantization`.
    Tensors of whole numbers stay as they are.
    """
    if not tensor.dtype.startswith(("F", "BF")) or tensor.dtype not in DTYPE_BITS:
        return tensor.nbytes
    return tensor.nbytes * 8 / DTYPE_BITS[tensor.dtype] * QUANTIZED_BYTES.get(quantization, itemsize)


@dataclass(frozen=True)
class Contents:
    """A model by its config and the headers of its weights. `description` is its config as JSON.

    `key` is the swarm's name for the model. `stored` is the method by which its weights are quantized already, if any.
    """

    files: Files
    description: Mapping[str, Any] = field(repr=False)
    model_type: str
    num_blocks: int
    hidden_size: int
    dtype: str
    stored: str | None
    file_of: Mapping[str, str] = field(repr=False)
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    _list: str  # what the names of the blocks' tensors begin with, up to the block's number

    @classmethod
    def open(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        allow_uncertified: bool = False,
    ) -> Contents:
        """The contents of a folder or of a model on the hub. Raises what `of` raises, and `UserError` if there is none.

        From the hub come the config and the headers.
        """
        files = find_files(model, revision=revision, token=token, cache_dir=None)
        if CONFIG not in files:
            raise missing_config(model, files.listing())
        return cls.of(files, allow_uncertified=allow_uncertified)

    @classmethod
    def of(cls, files: Files, *, allow_uncertified: bool = False) -> Contents:
        """The contents of these files.

        Raises `UnsupportedModel` for a family that is not certified, and `CheckpointError` for a config or a header
        that is damaged.
        """
        config = read_json(files, CONFIG)
        text = _language_model(config)
        model_type, own_type = config.get("model_type"), text.get("model_type")
        certified = CERTIFIED if text is config else CERTIFIED_WITH_VISION
        if not isinstance(model_type, str) or not (model_type in certified or allow_uncertified):
            raise uncertified(str(model_type)[:100])
        file_of = locate_tensors(files)
        tensors: dict[str, TensorInfo] = {}
        for file, header in files.headers(sorted(set(file_of.values()))).items():
            tensors |= {name: tensor for name, tensor in header.items() if file_of.get(name) == file}
        num_blocks, hidden_size = _number(text, *_BLOCKS), _number(text, *_HIDDEN)
        kinds = text.get("layers_block_type")
        if num_blocks is None and isinstance(kinds, list):
            num_blocks = len(kinds) or None
        if num_blocks is None or hidden_size is None:
            raise CheckpointError(f"{CONFIG} of {files.name} describes no model: it has no blocks, or no hidden size")
        own = _list_of_blocks(tensors, num_blocks)
        check_blocks(files.name, num_blocks, {int(found[3]) for found in _numbered(tensors) if _owner(found) == own})
        return cls(
            files,
            config,
            own_type if isinstance(own_type, str) else model_type,
            num_blocks,
            hidden_size,
            _dtype(text, config),
            _stored_method(config) or _stored_method(text),
            file_of,
            tensors,
            own,
        )

    @property
    def name(self) -> str:
        """A short name to show: that of the folder, or the id on the hub."""
        return self.files.name

    @property
    def key(self) -> str:
        """The swarm's name for the model (`shoal.model.weights.fingerprint`)."""
        return model_key(self.description, num_blocks=self.num_blocks, hidden_size=self.hidden_size)

    @property
    def known_fingerprint(self) -> str | None:
        """The name of the exact weights, if it is known without reading them."""
        digests = self.files.known_digests(sorted(set(self.file_of.values())))
        return None if digests is None else fingerprint(self.key, digests)

    def block_bytes(self, dtype: str, quantization: str = "none") -> tuple[int, ...]:
        """How many bytes of a server's memory each block takes, computed in `dtype` on a processor."""
        sizes = [0.0] * self.num_blocks
        for block, name, tensor in self._in_blocks:
            sizes[block] += self._held(name, tensor, dtype, quantization)
        return tuple(map(round, sizes))

    def read_bytes(self, dtype: str, quantization: str = "none") -> float:
        """How many bytes of a block are read to compute one token: all, but for experts that are not chosen. A mean."""
        total = sum(
            self._held(name, tensor, dtype, quantization) * self._share_of(name) for _, name, tensor in self._in_blocks
        )
        return total / self.num_blocks

    @property
    def used_weights(self) -> float:
        """With how many weights of a block a token is multiplied. A mean."""
        used = (self._numbers(name, tensor) * self._share_of(name) for _, name, tensor in self._in_blocks)
        return sum(used) / self.num_blocks

    def head_bytes(self, dtype: str) -> int:
        """How many bytes of a client's memory everything outside of the blocks takes."""
        of_head = (tensor for name, tensor in self.tensors.items() if not self._is_in_list(name))
        return round(sum(held_bytes(tensor, itemsize=ITEM_BYTES[dtype]) for tensor in of_head))

    def output_bytes(self, dtype: str) -> int:
        """How many bytes of the head are read for each new token: those of the output projection."""
        words = _number(_language_model(self.description), "vocab_size") or 0
        return words * self.hidden_size * ITEM_BYTES[dtype]

    def cache_bytes(self, dtype: str) -> int:
        """The bytes that a token takes in the cache of one block. Recurrent layers take less."""
        config = _language_model(self.description)
        heads = _number(config, *_HEADS) or 1
        if _number(config, "kv_lora_rank") is not None:  # latent attention, which is cached as ordinary keys and values
            sizes = (_number(config, each) or 0 for each in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
            return heads * sum(sizes) * ITEM_BYTES[dtype]
        cached = _number(config, "num_key_value_heads", "num_kv_heads") or heads
        if config.get("multi_query") is True and not config.get("new_decoder_architecture"):
            cached = 1
        size = _number(config, "head_dim") or self.hidden_size // heads
        return 2 * cached * size * ITEM_BYTES[dtype]

    @cached_property
    def _in_blocks(self) -> list[tuple[int, str, TensorInfo]]:
        """The blocks' tensors, each with its block and its name. Layers behind the last block do not count."""
        found = []
        for name, tensor in self.tensors.items():
            match = _NUMBERED.fullmatch(name)
            if match is not None and _owner(match) == self._list and int(match[3]) < self.num_blocks:
                found.append((int(match[3]), name, tensor))
        return found

    def _is_in_list(self, name: str) -> bool:
        match = _NUMBERED.fullmatch(name)
        return match is not None and _owner(match) == self._list

    def _held(self, name: str, tensor: TensorInfo, dtype: str, quantization: str) -> float:
        itemsize = ITEM_BYTES[dtype]
        if self.stored in DEQUANTIZED_ON_CPU:
            return self._numbers(name, tensor) * itemsize
        if self.stored is not None:
            return tensor.nbytes
        is_quantized = is_linear(self.model_type, name, tensor)
        return held_bytes(tensor, itemsize=itemsize, quantization=quantization if is_quantized else "none")

    def _numbers(self, name: str, tensor: TensorInfo) -> float:
        """How many weights a tensor has: scales of quantized ones are none, and a byte may hold two of them."""
        if self.stored is not None and name.endswith(("_scale_inv", "_scale", "_scales")):
            return 0
        count = math.prod(tensor.shape)
        return 2 * count if self.stored == "mxfp4" and name.endswith("_blocks") else count

    def _share_of(self, name: str) -> float:
        """The fraction of a tensor that one token needs: of experts, those that are chosen for it."""
        return self._chosen_share if "experts" in name.split(".") else 1.0

    @cached_property
    def _chosen_share(self) -> float:
        config = _language_model(self.description)
        chosen, of = _number(config, *_CHOSEN), _number(config, *_EXPERTS)
        return 1.0 if chosen is None or of is None else min(1.0, chosen / of)


def find_files(
    model: str | Path,
    *,
    revision: str | None,
    token: str | None,
    cache_dir: str | Path | None,
    local_files_only: bool = False,
) -> Files:
    """The files of a folder or of a repository on the hub. Raises `UserError` if there is neither."""
    if (folder := folder_of(model)) is not None:
        return LocalFiles(folder, name=folder.resolve().name)
    from shoal.model.weights.hub import open_repository

    return open_repository(
        str(model), revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )


def read_json(files: Files, file: str) -> dict[str, Any]:
    """The JSON object in a file. Raises `CheckpointError` if the file holds anything else."""
    try:
        content = json.loads(files.path(file).read_bytes())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} of {files.name} is damaged: it is not a JSON object", hint="download it again")
    return content


def locate_tensors(files: Files) -> Mapping[str, str]:
    """The file of each tensor. Raises `CheckpointError` if there are no weights that can be read."""
    if SINGLE_FILE in files:
        return dict.fromkeys(files.headers([SINGLE_FILE])[SINGLE_FILE], SINGLE_FILE)
    if INDEX in files:
        file_of = read_json(files, INDEX).get("weight_map")
        if not isinstance(file_of, dict) or not all(
            is_tensor_name(name) and _is_plain_name(file) for name, file in file_of.items()
        ):
            raise CheckpointError(f"{INDEX} of {files.name} is damaged: its weight_map does not map tensors to files")
        return file_of
    others = [file for file in files.listing() if file.endswith((*_UNREADABLE, ".safetensors"))]
    if not others:
        raise CheckpointError(f"{files.name} has no weights: neither {SINGLE_FILE} nor {INDEX}")
    raise unreadable_weights(files.name, others[0], place=files.origin)


def is_linear(model_type: str, name: str, tensor: TensorInfo) -> bool:
    """Whether a block's tensor is the weight of a linear layer, which a server can quantize.

    Experts, and most routers, are no linear layers in Transformers.
    """
    *owners, kind = name.split(".")
    if kind != "weight" or len(tensor.shape) != 2 or model_type in OWN_LINEARS:
        return False
    return owners[-1] not in LINEARS_READ_DIRECTLY and not _NOT_LINEAR & {*owners}


def check_blocks(name: str, num_blocks: int, found: Collection[int | None]) -> None:
    """Raise `CheckpointError` unless the model of this name has blocks, and tensors were found of each of them."""
    if not num_blocks:
        raise CheckpointError(f"{CONFIG} of {name} describes no model: it has no blocks")
    if (missing := next((block for block in range(num_blocks) if block not in found), None)) is not None:
        raise CheckpointError(
            f"{name} has {num_blocks} blocks by its {CONFIG}, but no tensor of block {missing}",
            hint=f"{CONFIG} and the weights belong to different models, or the index of the weights is incomplete",
        )


def _is_plain_name(file: Any) -> bool:
    """Whether a file is in the checkpoint's own folder: an index is not trusted and could name any path."""
    return isinstance(file, str) and PurePosixPath(file).name == file and file.endswith(".safetensors")


def _language_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _number(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of these fields that a config has, if it is a size."""
    values = (config.get(name) for name in names)
    return next((value for value in values if type(value) is int and 0 < value < MOST_NUMBER), None)


def _dtype(*configs: Mapping[str, Any]) -> str:
    """The dtype that the first of these configs names, as Transformers reads it: without one, it is float32."""
    named = (config.get(name) for config in configs for name in ("dtype", "torch_dtype"))
    return next((str(each) for each in named if isinstance(each, str) and each in ITEM_BYTES), "float32")


def _stored_method(config: Mapping[str, Any]) -> str | None:
    """The method by which the weights are quantized already; None for ordinary weights."""
    settings = config.get("quantization_config")
    return str(settings.get("quant_method") or "bitsandbytes") if isinstance(settings, dict) else None


def _numbered(names: Iterable[str]) -> Iterable[re.Match[str]]:
    return (found for name in names if (found := _NUMBERED.fullmatch(name)) is not None)


def _owner(found: re.Match[str]) -> str:
    return found.string[: found.start(3)]


def _list_of_blocks(tensors: Mapping[str, TensorInfo], num_blocks: int) -> str:
    """What the names of the blocks' tensors begin with: the list that has all blocks, and of several the largest.

    A model may have other lists, such as that of a vision tower. Raises `UnsupportedModel` if it has none at all.
    """
    sizes, numbers = Counter[str](), dict[str, set[int]]()
    for found in _numbered(tensors):
        sizes[_owner(found)] += tensors[found.string].nbytes
        numbers.setdefault(_owner(found), set()).add(int(found[3]))
    if not sizes:
        raise UnsupportedModel("this model has no list of layers that can be cut into blocks")
    return max(sizes, key=lambda owner: (sum(number < num_blocks for number in numbers[owner]), sizes[owner]))
