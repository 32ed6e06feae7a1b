"""What a server takes on where its config does not say: device, dtype, blocks, and memory for caches."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from shoal.errors import UserError
from shoal.host.computer import available_memory
from shoal.model.body import Body
from shoal.model.families import text_config
from shoal.model.family_tables import DEQUANTIZED_ON_CPU
from shoal.model.linear.quantization import (
    Quantization,
    dequantized_bytes,
    stored_quantization,
)
from shoal.model.weights.checkpoint import Checkpoint
from shoal.model.weights.contents import held_bytes, is_linear
from shoal.model.weights.safetensors_file import TensorInfo
from shoal.policy.dtypes import swarm_dtype
from shoal.policy.machines.max_blocks import cache_tokens, choose_num_blocks
from shoal.policy.view import SwarmView
from shoal.prefix import PAGE_TOKENS
from shoal.server.config import ServerConfig
from shoal.server.kv.cache_shapes import CacheShapes
from shoal.server.kv.paged_cache import output_bytes, state_pages
from shoal.server.kv.pages import pages_for

log = logging.getLogger(__name__)

MAX_ACTIVATION_FRACTION = 1 / 8
"""The most that saved activations take of the memory that is free after the cache is allocated."""


def check_blocks(config: ServerConfig, checkpoint: Checkpoint) -> None:
    """Raise `UserError` if the config names blocks that the model does not have."""
    if config.blocks is not None:
        if config.blocks.end > checkpoint.num_blocks:
            raise UserError(
                f"{checkpoint.name} has {checkpoint.num_blocks} blocks; there is no span {config.blocks} of them",
                hint=f"--blocks 0:{checkpoint.num_blocks} are all of them",
            )
        if config.serve_head and config.blocks.end < checkpoint.num_blocks:
            raise UserError(
                f"the output head follows the last block, which is not among {config.blocks}",
                hint=f"serve the head with blocks that end at {checkpoint.num_blocks}",
            )
    elif config.num_blocks is not None and config.num_blocks > checkpoint.num_blocks:
        raise UserError(
            f"{checkpoint.name} has only {checkpoint.num_blocks} blocks",
            hint="without --num-blocks, the server takes as many blocks as fit into memory",
        )


def max_num_blocks(config: ServerConfig, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> int:
    """The most blocks that a server holds: as the config says, or as many as fit into memory.

    Raises `UserError` if not even one block fits.
    """
    if config.blocks is not None:
        return len(config.blocks)
    if config.num_blocks is not None:
        return config.num_blocks
    memory = memory_for_blocks(config, checkpoint, dtype, free_memory(device))
    sizes = block_bytes(checkpoint, dtype, device, choose_quantization(config.quantization))
    num_blocks = choose_num_blocks(memory, sizes)
    if num_blocks == 0:
        largest = max(sizes)
        raise UserError(
            f"a block of {checkpoint.name} takes {largest / 2**30:.1f} GiB and {memory / 2**30:.1f} GiB are free",
            hint="free some memory, or choose the number yourself: --num-blocks 1",
        )
    log.info("up to %d of %d blocks: %.1f GiB are free", num_blocks, checkpoint.num_blocks, memory / 2**30)
    return num_blocks


def memory_for_blocks(config: ServerConfig, checkpoint: Checkpoint, dtype: torch.dtype, free_bytes: int) -> int:
    """The bytes of memory that are left for blocks and caches, of those that are free."""
    if not config.serve_head:
        return free_bytes
    return free_bytes - checkpoint.head_size(lambda tensor: held_bytes(tensor, itemsize=dtype.itemsize))


def most_blocks(config: ServerConfig, sizes: Sequence[int], memory: int) -> int:
    """The most blocks that a server may hold, wherever they are: as the config says, or as many as fit into memory.

    `sizes` are those of all blocks in bytes.
    """
    return config.num_blocks or choose_num_blocks(memory, sizes)


def default_device(*, cuda: bool) -> str:
    """The device of a machine that has a CUDA GPU or not: the GPU if there is one.

    Apple's GPUs are used only if the config names them, because shoal has not been tested on them.
    """
    return "cuda" if cuda else "cpu"


def choose_device(name: str) -> torch.device:
    """The device of this name; "auto" is `default_device`.

    Raises `UserError` if this machine, or its PyTorch, does not have it.
    """
    if name == "auto":
        name = default_device(cuda=torch.cuda.is_available())
    device = torch.device(name)
    usable = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not usable.get(device.type, False):
        raise UserError(
            f"PyTorch {torch.__version__} finds no device {name!r} on this machine",
            hint="use --device cpu, or install a driver and a PyTorch that support the device",
        )
    return device


def join_dtype(name: str, checkpoint: Checkpoint, view: SwarmView) -> torch.dtype:
    """The dtype of this name; "auto" is the swarm's (`shoal.policy.dtypes`), or the checkpoint's without a swarm.

    Raises `UserError` for a name that is no dtype.
    """
    own = str(choose_dtype("auto", checkpoint)).removeprefix("torch.")
    of_swarm = swarm_dtype(view, fingerprint=checkpoint.fingerprint, own=own)
    if name == "auto":
        return choose_dtype(of_swarm or own, checkpoint)
    if of_swarm not in (None, name):
        log.warning("the swarm computes in %s, but this server in %s, as its options say", of_swarm, name)
    return choose_dtype(name, checkpoint)


def choose_dtype(name: str, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of this name; "auto" is the checkpoint's. Raises `UserError` for a name that is no dtype."""
    if name == "auto":
        stored = text_config(checkpoint.config).dtype
        return stored if isinstance(stored, torch.dtype) else torch.float32
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise UserError(f"cannot compute in the dtype {name!r}", hint="auto, float32, bfloat16 or float16")
    return dtypes[name]


def choose_quantization(name: str) -> Quantization:
    """The quantization of this name. Raises `UserError` for a name that is none."""
    try:
        return Quantization(name)
    except ValueError:
        raise UserError(f"there is no quantization {name!r}", hint=", ".join(Quantization)) from None


def block_bytes(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, quantization: Quantization
) -> Sequence[int]:
    """How many bytes of memory each block of the model will take."""
    stored = stored_quantization(checkpoint.config)
    if stored in DEQUANTIZED_ON_CPU and device.type == "cpu":
        return dequantized_bytes(checkpoint.family, checkpoint.config, dtype)
    if stored is not None:
        return checkpoint.block_bytes
    family = checkpoint.family.model_type

    def size_of(name: str, tensor: TensorInfo) -> float:
        form = quantization if is_linear(family, name, tensor) else Quantization.NONE
        return held_bytes(tensor, itemsize=dtype.itemsize, quantization=form)

    return checkpoint.block_sizes(size_of)


def free_memory(device: torch.device) -> int:
    """How many bytes of a device's memory are free; for CPUs, what the system can provide without swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory()


def choose_num_pages(config: ServerConfig, body: Body, shapes: CacheShapes, free_bytes: int) -> int:
    """The number of pages of the cache: as the config says, or as memory allows.

    `free_bytes` of memory were free before the blocks were loaded. A part of that was set aside for caches when the
    blocks were chosen (`shoal.policy.machines.max_blocks`).
    """
    token_bytes = sum(bytes_of_token(body, shapes, cache_dtype_of(config, body)))
    if config.cache_tokens is not None:
        num_tokens = config.cache_tokens
    else:
        free_now = free_memory(body.backbone.device)
        num_tokens = cache_tokens(free_before=free_bytes, free_after=free_now, token_bytes=token_bytes)
    log.info(
        "the KV cache holds %d tokens in %.2f GiB: %.1f KiB for each token in %d blocks",
        num_tokens,
        num_tokens * token_bytes / 2**30,
        token_bytes / 2**10,
        len(body.span),
    )
    num_state_pages = state_pages(shapes, cache_dtype_of(config, body), body.backbone)
    if num_state_pages:
        log.info(
            "the states of a sequence take %.1f MiB, and count as %d of these tokens",
            shapes.state_bytes / 2**20,
            num_state_pages * PAGE_TOKENS,
        )
    return max(1 + num_state_pages, pages_for(num_tokens))


def choose_activation_bytes(config: ServerConfig, body: Body) -> int:
    """How many bytes of activations are saved for backward passes: as the config says, if memory allows."""
    return min(config.limits.activation_bytes, int(MAX_ACTIVATION_FRACTION * free_memory(body.backbone.device)))


def cache_dtype_of(config: ServerConfig, body: Body) -> torch.dtype:
    """The dtype of keys and values in the cache. Raises `UserError` if the config's dtype cannot be used."""
    if config.cache_dtype == "auto":
        dtype: torch.dtype = body.backbone.dtype
        return dtype
    if config.cache_dtype != "int8":
        raise UserError(f"the cache cannot be in the dtype {config.cache_dtype!r}", hint="auto or int8")
    if "int8" not in body.family.encodings:
        raise UserError(
            f"rounding to int8 changes the results of {body.family.model_type!r} too much",
            hint="leave --cache-dtype out",
        )
    return torch.int8


def bytes_of_token(body: Body, shapes: CacheShapes, dtype: torch.dtype) -> tuple[int, int]:
    """The bytes of the cache that a token takes in all blocks together, and those of the span's output for it.

    With each token there is room for a part of the states of a sequence.
    """
    num_pages = state_pages(shapes, dtype, body.backbone)
    states = shapes.state_bytes // (num_pages * PAGE_TOKENS) if num_pages else 0
    return shapes.token_bytes(dtype) + states, output_bytes(body.backbone)


def max_length_of(config: ServerConfig, checkpoint: Checkpoint) -> int:
    """How many tokens the longest sequence may have: the model's limit, or the config's if the model has none."""
    return getattr(text_config(checkpoint.config), "max_position_embeddings", None) or config.max_length
