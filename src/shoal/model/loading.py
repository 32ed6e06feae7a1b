"""Loading the blocks of a checkpoint. Blocks are quantized once, and the quantized weights are cached on disk."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.metadata
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from shoal.errors import CheckpointError
from shoal.host.whole_files import replacing
from shoal.model.body import Body, build_body
from shoal.model.families import text_config
from shoal.model.linear.quantization import Quantization, stored_quantization
from shoal.model.load_progress import reporting_blocks
from shoal.model.weights.checkpoint import Checkpoint
from shoal.model.weights.disk_cache import cache_folder
from shoal.model.weights.safetensors_file import read_header, read_tensors
from shoal.spans import Span

log = logging.getLogger(__name__)

Progress = Callable[[int, bool], None]
"""Called before each weight is loaded, with its block and with whether the weight is quantized now."""


def load_body(
    checkpoint: Checkpoint,
    span: Span,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quantization: Quantization = Quantization.NONE,
    progress: Progress = lambda block, quantizes: None,
) -> Body:
    """Load the blocks of `span`.

    Raises what `Checkpoint.block_tensors`, `build_body` and `progress` raise.
    """
    family = checkpoint.family
    cache: QuantizedBlockCache | None = None
    if quantization is not Quantization.NONE and stored_quantization(checkpoint.config) is None:
        cache = QuantizedBlockCache(checkpoint, dtype, quantization)
        try:
            with reporting_blocks(family, lambda block: progress(block, False)):
                return build_body(family, cache.config(), span, cache.read(span), dtype=dtype, device=device)
        except CheckpointError as error:
            log.info("quantizing blocks %s: %s", span, error)
    with reporting_blocks(family, lambda block: progress(block, cache is not None)):
        return build_body(
            family,
            checkpoint.config,
            span,
            # No variable holds the tensors, so that each is freed once the body has it in another form.
            checkpoint.block_tensors(span),
            dtype=dtype,
            device=device,
            quantization_config=quantization.config(dtype),
            save=None if cache is None else functools.partial(cache.write, span),
        )


@dataclass(frozen=True)
class QuantizedBlockCache:
    """Quantized blocks on disk, in one safetensors file per block.

    Files are named by the exact weights, the quantization, the dtype and the versions of the libraries. A block whose
    file is missing, damaged or cannot be written is quantized again.
    """

    checkpoint: Checkpoint
    dtype: torch.dtype
    quantization: Quantization

    def config(self) -> PreTrainedConfig:
        """The config of a checkpoint that would hold these quantized blocks."""
        config = copy.copy(text_config(self.checkpoint.config))
        config.quantization_config = self.quantization.config(self.dtype)
        return config

    def has(self, block: int) -> bool:
        """Whether this block was quantized before."""
        return self._file(block).is_file()

    def read(self, span: Span) -> dict[str, Tensor]:
        """The tensors of these blocks. Raises `CheckpointError` if a file is missing or damaged."""
        tensors: dict[str, Tensor] = {}
        for block in span:
            file = self._file(block)
            tensors |= read_tensors(file, list(read_header(file)))
        return tensors

    def write(self, span: Span, tensors: Mapping[str, Tensor]) -> None:
        """Store the tensors of these blocks, given by their names in the backbone. Disk errors are ignored."""
        for block in span:
            of_block = {
                name: tensor.contiguous()
                for name, tensor in tensors.items()
                if self.checkpoint.family.block_of(name) == block
            }
            with contextlib.suppress(OSError), replacing(self._file(block)) as draft:
                save_file(dict(of_block), draft)

    def _file(self, block: int) -> Path:
        key = [self.checkpoint.fingerprint, self.quantization.value, str(self.dtype), *quantizing_versions()]
        digest = hashlib.sha256("\n".join(key).encode()).hexdigest()[:32]
        return cache_folder() / "quantized" / digest / f"block-{block}.safetensors"


@functools.cache
def quantizing_versions() -> tuple[str, ...]:
    """The packages that decide what quantized weights look like."""
    return tuple(f"{package} {importlib.metadata.version(package)}" for package in ("bitsandbytes", "transformers"))
