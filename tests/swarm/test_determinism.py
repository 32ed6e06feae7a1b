"""What a server promises about bits: the same passes give the same ones; other sessions beside change rounding only."""

from __future__ import annotations

import pytest
import torch

from benchmarks.determinism import Finding, scene_of
from shoal.model.body import Body, build_body
from shoal.model.families import family_of
from shoal.spans import Span

from .tiny_models import NUM_BLOCKS, tiny_config, tiny_model

DTYPES = [torch.float32, torch.bfloat16]
ROUNDING = 16
"""Units of the dtype's epsilon, relative to the largest output. A token of another session is off by about 1."""


def body_in(dtype: torch.dtype, family: str) -> Body:
    config = tiny_config(family)
    state = tiny_model(config).state_dict()
    return build_body(family_of(config, allow_uncertified=True), config, Span(0, NUM_BLOCKS), state, dtype=dtype)


def findings(dtype: torch.dtype, family: str) -> dict[str, Finding]:
    scene, _ = scene_of(body_in(dtype, family))
    return {each.what: each for each in scene.compare()}


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_passes_give_the_same_bits(dtype: torch.dtype, family: str):
    assert findings(dtype, family) == (found := findings(dtype, family))
    assert found["the same step twice"].is_equal


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sessions_beside_change_no_more_than_the_rounding(dtype: torch.dtype, family: str):
    differences = {what: each.difference for what, each in findings(dtype, family).items()}
    assert len(differences) == 7
    assert max(differences.values()) <= ROUNDING * torch.finfo(dtype).eps, differences
