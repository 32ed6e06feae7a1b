"""What a server takes on, where it was not told: which device, dtype and blocks, and how much room for caches."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import psutil
import torch

from shoal.errors import UserError
from shoal.model.body import Body
from shoal.model.families import text_config
from shoal.model.linear.quantization import (
    DEQUANTIZED_ON_CPU,
    Quantization,
    dequantized_bytes,
    quantizable_weights,
    stored_quantization,
)
from shoal.model.weights.checkpoint import Checkpoint
from shoal.model.weights.safetensors_file import TensorInfo
from shoal.policy.dtypes import swarm_dtype
from shoal.policy.placement import CACHE_SHARE, choose_num_blocks, choose_span
from shoal.policy.view import SwarmView
from shoal.server.config import ServerConfig
from shoal.server.kv.paged_cache import KeyValueShape
from shoal.server.kv.pages import pages_for
from shoal.spans import Span

log = logging.getLogger(__name__)

MOST_CACHE_TOKENS = 1 << 20
MOST_OF_WHAT_IS_LEFT = 0.8
KEPT_PARTS = 8


def check_blocks(config: ServerConfig, checkpoint: Checkpoint) -> None:
    """Raises `UserError` for blocks that the model does not have."""
    if config.blocks is not None:
        if config.blocks.end > checkpoint.num_blocks:
            raise UserError(
                f"{checkpoint.name} has {checkpoint.num_blocks} blocks; there is no span {config.blocks} of them",
                hint=f"--blocks 0:{checkpoint.num_blocks} are all of them",
            )
        if config.serve_head and config.blocks.end < checkpoint.num_blocks:
            raise UserError(
                f"the output head follows the last block, which is not among {config.blocks}",
                hint=f"serve it with blocks that end at {checkpoint.num_blocks}",
            )
    elif config.num_blocks is not None and config.num_blocks > checkpoint.num_blocks:
        raise UserError(
            f"{checkpoint.name} has only {checkpoint.num_blocks} blocks",
            hint="leave --num-blocks out, and as many are served as fit into memory",
        )


def choose_blocks(
    config: ServerConfig, checkpoint: Checkpoint, view: SwarmView, dtype: torch.dtype, device: torch.device
) -> Span:
    """The span that was asked for, or the one that helps the swarm most and fits into memory."""
    if config.blocks is not None:
        return config.blocks
    memory = free_memory(device)
    if config.serve_head:
        memory -= round(checkpoint.head_bytes * dtype.itemsize / choose_dtype("auto", checkpoint).itemsize)
    block_bytes = _block_bytes(checkpoint, dtype, device, choose_quantization(config.quantization))
    num_blocks = config.num_blocks or choose_num_blocks(memory, block_bytes)
    if num_blocks == 0:
        largest = max(block_bytes)
        raise UserError(
            f"a block of {checkpoint.name} takes {largest / 2**30:.1f} GiB and {memory / 2**30:.1f} GiB are free",
            hint="free some memory, or name the blocks yourself: --num-blocks 1",
        )
    span = choose_span(view.throughput(), num_blocks=num_blocks)
    log.info("serving blocks %s of %d: %.1f GiB are free", span, checkpoint.num_blocks, memory / 2**30)
    if config.serve_head and span.end < checkpoint.num_blocks:
        log.warning("serving no output head: it follows the last block, and others are needed more")
    return span


def default_device(*, cuda: bool) -> str:
    """Where to compute on a machine that has this: a GPU if there is one.

    Apple's GPUs are not chosen without being asked for, because nothing of shoal has been tested on them.
    """
    return "cuda" if cuda else "cpu"


def choose_device(name: str) -> torch.device:
    """The device that was asked for; "auto" is the first that `default_device` finds.

    Raises `UserError` if this machine, or its PyTorch, has none.
    """
    if name == "auto":
        name = default_device(cuda=torch.cuda.is_available())
    device = torch.device(name)
    usable = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not usable.get(device.type, False):
        raise UserError(
            f"PyTorch {torch.__version__} finds no device {name!r} here",
            hint="use --device cpu, or install a PyTorch and a driver that know it",
        )
    return device


def join_dtype(name: str, checkpoint: Checkpoint, view: SwarmView) -> torch.dtype:
    """The dtype that was asked for; "auto" is the swarm's (`shoal.policy.dtypes`)."""
    own = str(choose_dtype("auto", checkpoint)).removeprefix("torch.")
    of_swarm = swarm_dtype(view, fingerprint=checkpoint.fingerprint, own=own)
    if name == "auto":
        return choose_dtype(of_swarm or own, checkpoint)
    if of_swarm not in (None, name):
        log.warning("the swarm computes in %s, and this server in %s, as it was told", of_swarm, name)
    return choose_dtype(name, checkpoint)


def choose_dtype(name: str, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that was asked for; "auto" is the checkpoint's own."""
    if name == "auto":
        stored = text_config(checkpoint.config).dtype
        return stored if isinstance(stored, torch.dtype) else torch.float32
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise UserError(f"{name!r} is no dtype to compute in", hint="auto, float32, bfloat16 or float16")
    return dtypes[name]


def choose_quantization(name: str) -> Quantization:
    """The quantization that was asked for."""
    try:
        return Quantization(name)
    except ValueError:
        raise UserError(f"there is no quantization {name!r}", hint=", ".join(Quantization)) from None


def _block_bytes(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, quantization: Quantization
) -> Sequence[int]:
    """What each block will take in memory."""
    stored = stored_quantization(checkpoint.config)
    if stored in DEQUANTIZED_ON_CPU and device.type == "cpu":
        return dequantized_bytes(checkpoint.family, checkpoint.config, dtype)
    if stored is not None:
        return checkpoint.block_bytes
    growth = dtype.itemsize / choose_dtype("auto", checkpoint).itemsize
    if quantization is Quantization.NONE:
        return checkpoint.block_sizes(lambda name, tensor: tensor.nbytes * growth)
    quantized = quantizable_weights(checkpoint.family, checkpoint.config)
    shrinkage = quantization.weight_bytes(dtype) / dtype.itemsize

    def size_of(name: str, tensor: TensorInfo) -> float:
        is_quantized = checkpoint.family.name_in_backbone(name) in quantized
        return tensor.nbytes * growth * (shrinkage if is_quantized else 1)

    return checkpoint.block_sizes(size_of)


def free_memory(device: torch.device) -> int:
    """Bytes that may be used on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def choose_num_pages(config: ServerConfig, body: Body, shapes: Mapping[int, KeyValueShape] | None, memory: int) -> int:
    """How many pages of the cache there are: those that were asked for, or a fair part of what memory is left.

    `memory` is what was free before the blocks were loaded: a server that chose its own blocks kept a part of it.
    """
    token_bytes = _token_bytes(body, shapes, cache_dtype_of(config, body))
    if config.cache_tokens is not None:
        num_tokens = config.cache_tokens
    else:
        room = min(CACHE_SHARE * memory, MOST_OF_WHAT_IS_LEFT * free_memory(body.backbone.device))
        num_tokens = int(min(room // token_bytes, MOST_CACHE_TOKENS))
    log.info(
        "the cache has room for %d tokens of sessions, %.2f GiB: %.1f KiB a token in %d blocks",
        num_tokens,
        num_tokens * token_bytes / 2**30,
        token_bytes / 2**10,
        len(body.span),
    )
    return max(1, pages_for(num_tokens))


def choose_activation_bytes(config: ServerConfig, body: Body) -> int:
    """How much of forward passes is kept for backward passes: no more than a part of what memory is left."""
    return min(config.limits.activation_bytes, free_memory(body.backbone.device) // KEPT_PARTS)


def cache_dtype_of(config: ServerConfig, body: Body) -> torch.dtype:
    """The dtype of keys and values in the cache. Raises `UserError` where the one that was asked for cannot be."""
    if config.cache_dtype == "auto":
        dtype: torch.dtype = body.backbone.dtype
        return dtype
    if config.cache_dtype != "int8":
        raise UserError(f"{config.cache_dtype!r} is no dtype for the cache", hint="auto or int8")
    if not body.family.packable:
        raise UserError(
            f"the sessions of {body.family.model_type!r} are kept as they are: they cannot be in int8",
            hint="leave out --cache-dtype",
        )
    return torch.int8


def _token_bytes(body: Body, shapes: Mapping[int, KeyValueShape] | None, dtype: torch.dtype) -> int:
    """What a token of a session takes in all blocks, with the span's output for it."""
    config = body.backbone.config
    if shapes is not None:
        outputs: int = config.hidden_size * body.backbone.dtype.itemsize
        return outputs + sum(shape.nbytes(dtype) for shape in shapes.values())
    # for recurrent state, which does not grow, this is more than enough
    num_heads = getattr(config, "num_attention_heads", None) or 1
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return int(2 * num_kv_heads * head_dim * len(body.span) * dtype.itemsize)


def max_length_of(config: ServerConfig, checkpoint: Checkpoint) -> int:
    """The longest sequence that the model was made for."""
    return getattr(text_config(checkpoint.config), "max_position_embeddings", None) or config.max_length
