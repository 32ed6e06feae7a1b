"""What the last server answers for several steps under way is given to each of them, whatever the pieces it came in."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.client.decoding.outputs import Outputs
from shoal.client.head.logits import Logits, LogitsRequest

LENGTHS = st.lists(st.integers(1, 5), min_size=1, max_size=6)


def cuts_of(lengths: list[int], total: int) -> list[int]:
    """Positions from 0 to `total`, as far apart as these lengths say."""
    cuts = [0]
    while cuts[-1] < total:
        cuts.append(min(total, cuts[-1] + lengths[len(cuts) % len(lengths)]))
    return cuts


@given(steps=LENGTHS, pieces=LENGTHS, has_ids=st.booleans(), are_logits=st.booleans())
def test_each_step_takes_its_own(steps: list[int], pieces: list[int], has_ids: bool, are_logits: bool):
    start, total = 7, sum(steps)
    all_BTD = torch.arange(2 * total * 3).reshape(2, total, 3)
    outputs = Outputs.of_step(start, start + steps[0], LogitsRequest(steps[0], 3, None) if are_logits else None)
    position, came = 0, iter(pairwise(cuts_of(pieces, total)))
    known = 0
    for length in steps:
        while known < position + length:
            first, known = next(came)
            piece_BTD = all_BTD[:, first:known]
            if are_logits:
                outputs.logits.append(Logits(piece_BTD, -piece_BTD if has_ids else None))
            else:
                outputs.append(piece_BTD, start + first)
        found = outputs.take(start + position + length)
        wanted = all_BTD[:, position : position + length]
        values = found.values if isinstance(found, Logits) else found
        assert torch.equal(values, wanted)
        if isinstance(found, Logits):
            assert (found.ids is not None) == has_ids
            assert found.ids is None or torch.equal(found.ids, -wanted)
        position += length
        assert outputs.logits_from == start + position
    assert not outputs.logits


def test_of_a_prompt_only_the_logits_of_its_last_tokens_are_wanted():
    outputs = Outputs.of_step(4, 20, LogitsRequest(1, 3, None))
    assert (outputs.num_tokens, outputs.logits_from) == (4, 19)
    outputs.logits.append(Logits(torch.ones(1, 3, 3), None))  # with those of a step that was sent ahead
    found = outputs.take(20)
    assert isinstance(found, Logits)
    assert found.values.shape[1] == 1
    assert (outputs.num_tokens, outputs.logits_from) == (20, 20)
    assert outputs.logits[0].values.shape[1] == 2
