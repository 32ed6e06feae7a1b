from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from .harness import Swarm, swarm_of


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights: 4 blocks."""
    return make_llama(tmp_path_factory.mktemp("llama"), seed=0)


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    return make_llama(tmp_path_factory.mktemp("llama"), seed=1)


def make_llama(path: Path, *, seed: int, max_position_embeddings: int = 512) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_position_embeddings,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        initializer_range=0.4,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def whole(folder: Path) -> PreTrainedModel:
    """The same model in one piece: the oracle."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@pytest.fixture
def swarm(folder: Path) -> Iterator[Callable[..., Swarm]]:
    """Makes swarms of the tiny model: `swarm("0:2", "2:4")`."""
    with ExitStack() as stack:

        def make(*spans: str, **options: Any) -> Swarm:
            return stack.enter_context(swarm_of(folder, *spans, **options))

        yield make


@pytest.fixture(scope="module")
def no_log_lines() -> Iterator[None]:
    """Nothing is logged: of random schedules, every warning that there is would be printed many thousand times."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
