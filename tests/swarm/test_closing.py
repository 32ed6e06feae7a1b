"""What is said when a client is closed, or the program ends, in the middle of something."""

from __future__ import annotations

import logging

import pytest
import torch

from .harness import swarm_of


@pytest.fixture(scope="module")
def folder():
    from shoal.bundled import STORIES

    return STORIES


def test_a_client_that_goes_with_an_open_session_takes_no_server_for_lost(folder, caplog: pytest.LogCaptureFixture):
    with swarm_of(folder, "0:6", "6:12") as swarm:
        model = swarm.model()
        session = model.inference_session(max_length=32)
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, session=session)
        with caplog.at_level(logging.INFO, "shoal"):
            model.close()
            swarm.settle(lambda: not swarm.network.num_streams("client2"))
        session.close()  # once more
    assert [each.getMessage() for each in caplog.records if "lost" in each.getMessage()] == []
