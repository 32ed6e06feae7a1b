"""One swarm a module and family: two servers that share the tiny model's five blocks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, logging

from tests.swarm.harness import swarm_of
from tests.swarm.tiny_models import tiny_config, tiny_model

from .pair import FAMILIES, Pair


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(tiny_config(request.param)).save_pretrained(folder)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with swarm_of(folder, "0:2", "2:5") as swarm:
        yield Pair(request.param, whole, swarm.model(), swarm)
    logging.enable_progress_bar()
