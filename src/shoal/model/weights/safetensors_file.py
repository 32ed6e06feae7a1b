"""Reading one safetensors file: its header, a check of the header against the file, and its tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from shoal.errors import CheckpointError

if TYPE_CHECKING:
    import torch

MAX_DIMENSIONS = 64
MAX_HEADER_BYTES = 100_000_000
"""The longest header that the format allows."""
MAX_NAME = 256
"""Characters of a tensor's name. Those of real models have up to about a hundred; a member may send any."""
DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64"), 64),
}
"""The bits of a number, by the format's name of its dtype. The format has others, whose tensors are not checked."""
MAX_NUMBERS = 1 << 53
"""No tensor has as many numbers."""
OWN_MAPPING_BYTES = 1 << 23
"""Tensors of at least this size get a memory mapping of their own, because a mapping lives as long as any of its
tensors. Smaller ones share a mapping."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its file's header declares it. Its bytes end at offset `end` from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    end: int


Header = Mapping[str, TensorInfo]


def parse_header(text: bytes, *, file: str) -> Header:
    """The tensors that a safetensors header declares. Raises `CheckpointError` if the header is malformed."""
    try:
        declared = json.loads(text)
        header = {name: _tensor_info(entry) for name, entry in declared.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise _damaged(file, "its header is not that of a safetensors file") from None
    if not all(map(is_tensor_name, header)):
        raise _damaged(file, f"a tensor's name is longer than {MAX_NAME} characters, or some cannot be printed")
    return header


def is_tensor_name(name: str) -> bool:
    """Whether this can be the name of a tensor: short enough to be searched by patterns, and printable in messages."""
    return len(name) <= MAX_NAME and name.isprintable()


def header_bytes(path: Path) -> int:
    """The bytes of a file before its tensors, of which only the first 8 are read. Raises `CheckpointError`."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    if not 2 <= length <= MAX_HEADER_BYTES or length + 8 > size:
        raise _damaged(path.name, "its header is not that of a safetensors file")
    return 8 + length


def read_header(path: Path) -> Header:
    """The tensors that a file declares.

    Raises `CheckpointError` if the file cannot be read, if its header is malformed, or if the file is too short for the
    tensors that it declares.
    """
    start, size = header_bytes(path), path.stat().st_size
    with path.open("rb") as file:
        header = parse_header(file.read(start)[8:], file=path.name)
    for name, tensor in header.items():
        if tensor.end > size - start:
            missing = tensor.end - (size - start)
            raise _damaged(
                path.name, f"it is truncated: tensor {name} lacks {min(missing, tensor.nbytes)} of its bytes"
            )
    check_header(header, file=path.name, size=size - start)
    return header


def check_header(header: Header, *, file: str, size: int) -> None:
    """Check tensors that a header declares against the `size` in bytes of all of them.

    Raises `CheckpointError` if a tensor is beyond the file or has another size than its shape, or if tensors overlap.
    """
    for name, tensor in header.items():
        bits = DTYPE_BITS.get(tensor.dtype)
        is_inside = 0 <= tensor.nbytes <= tensor.end <= size
        has_shape = min(tensor.shape, default=0) >= 0
        if not (is_inside and has_shape and (bits is None or 8 * tensor.nbytes == math.prod(tensor.shape) * bits)):
            raise _damaged(file, f"its header says what cannot be of tensor {name[:100]}")
    if sum(tensor.nbytes for tensor in header.values()) > size:
        raise _damaged(file, "its header has tensors that overlap")


def read_tensors(path: Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """These tensors of a file, mapped into memory: their bytes are read from disk when they are first used.

    The pages belong to the file cache of the operating system. Servers on one machine share them, and the system drops
    them first when memory is short. The file must not change while its tensors are in use. Raises `CheckpointError`.
    """
    header = read_header(path)
    for name in names:
        if name not in header:
            raise CheckpointError(
                f"tensor {name} is missing from {path.name}, where the index says it is",
                hint="download the model again",
            )
    mappings = [[name] for name in names if header[name].nbytes >= OWN_MAPPING_BYTES]
    mappings.append([name for name in names if header[name].nbytes < OWN_MAPPING_BYTES])
    tensors: dict[str, torch.Tensor] = {}
    try:
        for together in mappings:
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in together}
        return tensors
    except SafetensorError as error:
        raise _damaged(path.name, str(error)) from None


def read_all(names_in: Mapping[Path, Sequence[str]]) -> dict[str, torch.Tensor]:
    """These tensors of each of several files, as `read_tensors` reads them. Raises `CheckpointError`."""
    tensors: dict[str, torch.Tensor] = {}
    for path, names in names_in.items():
        tensors |= read_tensors(path, names)
    return tensors


def _tensor_info(entry: Mapping[str, Any]) -> TensorInfo:
    start, end = (int(offset) for offset in entry["data_offsets"])
    if not 0 <= start <= end:
        raise ValueError
    shape = tuple(int(size) for size in entry["shape"])
    if len(shape) > MAX_DIMENSIONS or math.prod(shape) > MAX_NUMBERS:
        raise ValueError
    return TensorInfo(str(entry["dtype"]), shape, end - start, end)


def _damaged(file: str, why: str) -> CheckpointError:
    return CheckpointError(f"{file} is damaged: {why}", hint="delete this file and download it again")
