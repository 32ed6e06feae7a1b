from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.client.history import History


@given(st.data())
def test_a_history_is_what_was_appended_rearranged_and_cropped(data: st.DataObject):
    """Against the plainest implementation: one tensor that is rebuilt at every operation."""
    history, plain, counter = History(), torch.zeros(2, 0, 1), 0
    for _ in range(data.draw(st.integers(1, 12))):
        match data.draw(st.sampled_from(["append", "append", "select", "crop"])):
            case "append":
                batch_size, num_tokens = plain.shape[0], data.draw(st.integers(1, 3))
                piece = torch.arange(counter, counter + batch_size * num_tokens).view(batch_size, num_tokens, 1)
                counter += batch_size * num_tokens
                history.append(piece)
                plain = torch.cat((plain, piece), dim=1)
            case "select" if plain.shape[1]:
                rows = data.draw(st.lists(st.integers(0, plain.shape[0] - 1), min_size=1, max_size=4))
                history.select_rows(rows)
                plain = plain[rows]
            case "crop" if plain.shape[1]:
                num_tokens = data.draw(st.integers(1, plain.shape[1]))
                history.crop(num_tokens)
                plain = plain[:, :num_tokens]
        assert history.num_tokens == plain.shape[1]
        if plain.shape[1]:
            position = data.draw(st.integers(0, plain.shape[1] - 1))
            assert history.since(position).tolist() == plain[:, position:].tolist()


def test_a_history_that_was_cropped_to_nothing_may_begin_with_another_batch():
    history = History()
    history.append(torch.zeros(2, 3, 1))
    history.select_rows([1, 1, 0])
    history.crop(0)
    history.append(torch.ones(5, 2, 1))
    assert history.since(0).tolist() == torch.ones(5, 2, 1).tolist()
