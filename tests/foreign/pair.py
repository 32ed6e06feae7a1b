"""Plain Transformers on one machine beside the same model in a swarm, and what may be asked of both."""

# B sequences, T tokens, V vocabulary

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.swarm.harness import Swarm
from tests.swarm.parity import assert_equal
from tests.swarm.tiny_models import VOCABULARY

FAMILIES = ("llama", "qwen3", "gemma3_text", "bloom")
NEVER = VOCABULARY - 1
"""A token that ends a text in none of these tests, where they want texts of a certain length."""

TEXTS = torch.randint(3, VOCABULARY - 1, (3, 9), generator=torch.Generator().manual_seed(3))
LEFT = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [0] * 2 + [1] * 7])
RIGHT = LEFT.flip(1)
HOLES = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1, 0, 0, 1], [0, 1, 1, 0, 1, 1, 1, 0, 0]])
MASKS: Mapping[str, Tensor | None] = {
    "no padding": None,
    "padding on the left": LEFT,
    "padding on the right": RIGHT,
    "holes": HOLES,
}


@dataclass(frozen=True)
class Pair:
    """`whole` is the oracle; `model` is to give the same, by the servers of `swarm`."""

    family: str
    whole: PreTrainedModel
    model: Any
    swarm: Swarm

    def inputs(self, mask: str) -> dict[str, Any]:
        """Texts that are padded like that."""
        mask_BT = MASKS[mask]
        if mask_BT is None:
            return {"input_ids": TEXTS}
        return {"input_ids": TEXTS * mask_BT, "attention_mask": mask_BT}

    def generate(self, **options: Any) -> tuple[Any, Any]:
        """What the swarm generates, and what it should."""
        options = {"max_new_tokens": 8, "eos_token_id": NEVER, "return_dict_in_generate": True, **options}
        found = []
        for model in (self.model, self.whole):
            torch.manual_seed(5)
            found.append(model.generate(**options))
        return found[0], found[1]


def assert_same_generation(actual: Any, expected: Any) -> None:
    """The same tokens; scores and logits within rounding, where there are any."""
    assert actual.sequences.tolist() == expected.sequences.tolist()
    for name in ("scores", "logits"):
        steps, expected_steps = getattr(actual, name), getattr(expected, name)
        assert (steps is None) == (expected_steps is None)
        if steps is not None:
            assert_close(torch.stack(steps), torch.stack(expected_steps))
    if (best := getattr(expected, "sequences_scores", None)) is not None:
        assert_equal(actual.sequences_scores, best)
        assert actual.beam_indices.tolist() == expected.beam_indices.tolist()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to rounding, and infinite in the same places: a processor has ruled a token out there."""
    assert torch.equal(actual.isfinite(), expected.isfinite())
    assert_equal(actual[actual.isfinite()], expected[expected.isfinite()])
