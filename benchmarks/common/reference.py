"""The reference model of all benchmarks: Llama's architecture, random weights, 1.10 B parameters in bf16.

    python -m benchmarks.common.reference [FOLDER]

makes the model, if it is not there, and prints its folder.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

SHARD_SIZE = "500MB"


NUM_BLOCKS = 16


def reference_config(num_blocks: int = NUM_BLOCKS) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=num_blocks,
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        max_position_embeddings=8192,
        dtype="bfloat16",
    )


def default_folder() -> Path:
    """`SHOAL_REFERENCE_MODEL`, or a folder among the temporary files. The model takes 2.2 GB."""
    return Path(os.environ.get("SHOAL_REFERENCE_MODEL") or Path(tempfile.gettempdir()) / "shoal-reference-model")


def llama_8b_config() -> LlamaConfig:
    """The shapes of Llama 3.1 8B."""
    return LlamaConfig(
        num_hidden_layers=32,
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        dtype="bfloat16",
    )


def tiny_config() -> LlamaConfig:
    """A model to try a benchmark with."""
    return LlamaConfig(
        num_hidden_layers=4,
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=8192,
        dtype="bfloat16",
    )


def reference_model(folder: Path | None = None, *, num_blocks: int = NUM_BLOCKS) -> Path:
    """The folder of the reference model. Makes the model if it is not there; the seed is fixed.

    A model with fewer blocks, for trials, has a folder of its own.
    """
    folder = folder or default_folder()
    if num_blocks != NUM_BLOCKS:
        folder = folder.with_name(f"{folder.name}-{num_blocks}")
    return made_model(reference_config(num_blocks), folder)


def made_model(config: LlamaConfig, folder: Path, *, device: str = "cpu") -> Path:
    """The folder of a model with random weights. Makes the model, on this device, if it is not there."""
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Made beside its place and then renamed, so that benchmarks that start together see all of it or nothing.
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}-"))
    try:
        random = torch.Generator(device).manual_seed(0)
        # Transformers' own initialization takes a minute; these are the same distributions.
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        weights = {
            name: torch.ones_like(tensor, device="cpu")
            if tensor.dim() == 1
            else torch.empty_like(tensor, device=device).normal_(std=0.02, generator=random).cpu()
            for name, tensor in model.state_dict().items()
        }
        model.generation_config = GenerationConfig()
        model.save_pretrained(draft, state_dict=weights, max_shard_size=SHARD_SIZE)
        draft.rename(folder)
    except OSError:
        if not (folder / "config.json").exists():  # otherwise another process made it first
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


if __name__ == "__main__":
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        sys.exit()
    print(reference_model(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
