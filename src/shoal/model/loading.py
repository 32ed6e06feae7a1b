"""From a checkpoint to blocks that compute; quantized once, and read quantized from then on."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.metadata
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from shoal.errors import CheckpointError
from shoal.model.body import Body, build_body
from shoal.model.families import text_config
from shoal.model.linear.quantization import Quantization, stored_quantization
from shoal.model.load_progress import hearing
from shoal.model.weights.checkpoint import Checkpoint
from shoal.model.weights.disk_cache import cache_folder
from shoal.model.weights.safetensors_file import read_header, read_tensors
from shoal.spans import Span

log = logging.getLogger(__name__)

Progress = Callable[[int, bool], None]


def load_body(
    checkpoint: Checkpoint,
    span: Span,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quantization: Quantization = Quantization.NONE,
    progress: Progress = lambda block, quantizes: None,
) -> Body:
    """The blocks of `span`. Raises what `Checkpoint.block_tensors`, `build_body` and `progress` raise.

    `progress` hears before each weight which block it belongs to, and whether it is quantized now.
    """
    family = checkpoint.family
    kept: CachedBlocks | None = None
    if quantization is not Quantization.NONE and stored_quantization(checkpoint.config) is None:
        kept = CachedBlocks(checkpoint, dtype, quantization)
        try:
            with hearing(family, lambda block: progress(block, False)):
                return build_body(family, kept.config(), span, kept.read(span), dtype=dtype, device=device)
        except CheckpointError as error:
            log.info("quantizing blocks %s: %s", span, error)
    with hearing(family, lambda block: progress(block, kept is not None)):
        return build_body(
            family,
            checkpoint.config,
            span,
            # Passed on without a name: so each tensor is let go of once the body has it in another form.
            checkpoint.block_tensors(span),
            dtype=dtype,
            device=device,
            quantization_config=quantization.config(dtype),
            keep=None if kept is None else functools.partial(kept.write, span),
        )


@dataclass(frozen=True)
class CachedBlocks:
    """Quantized blocks on disk, a safetensors file for each: exact weights in, the same quantized weights out.

    What is missing, damaged or cannot be written is quantized again: nothing depends on these files.
    """

    checkpoint: Checkpoint
    dtype: torch.dtype
    quantization: Quantization

    def config(self) -> PreTrainedConfig:
        """The config of a checkpoint that consists of these blocks."""
        config = copy.copy(text_config(self.checkpoint.config))
        config.quantization_config = self.quantization.config(self.dtype)
        return config

    def read(self, span: Span) -> dict[str, Tensor]:
        """The tensors of these blocks. Raises `CheckpointError` if one of them is not there or damaged."""
        tensors: dict[str, Tensor] = {}
        for block in span:
            file = self._file(block)
            tensors |= read_tensors(file, list(read_header(file)))
        return tensors

    def write(self, span: Span, tensors: Mapping[str, Tensor]) -> None:
        for block in span:
            of_block = {
                name: tensor.contiguous()
                for name, tensor in tensors.items()
                if self.checkpoint.family.block_of(name) == block
            }
            with contextlib.suppress(OSError):
                _replace(self._file(block), of_block)

    def _file(self, block: int) -> Path:
        versions = [f"{package} {importlib.metadata.version(package)}" for package in ("bitsandbytes", "transformers")]
        fact = [self.checkpoint.fingerprint, self.quantization.value, str(self.dtype), *versions]
        digest = hashlib.sha256("\n".join(fact).encode()).hexdigest()[:32]
        return cache_folder() / "quantized" / digest / f"block-{block}.safetensors"


def _replace(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file so that nobody ever sees a part of it, not even after a crash."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=file.parent)
    os.close(handle)
    try:
        save_file(dict(tensors), draft)
        os.replace(draft, file)
    finally:
        Path(draft).unlink(missing_ok=True)
