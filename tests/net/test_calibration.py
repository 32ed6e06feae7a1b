"""Fourteen real server processes behind shaped links, and their simulated twin.

No time is compared with a constant, so the machine may be slow: what a token takes in the processes of this machine is
measured first, without links, and that is what the twin is told. Then the links come, which take much longer than the
processes do, and with them more clients. What the twin says of this second part is compared with what happens. So that
other programs may disturb it, the figures are medians over tokens, of the better one of two rounds. Routes have two,
three and four servers, and other delays each: a message more or less on each route would be a difference of a fifth.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.calibration import ROUTES, SPANS, measure, opened
from shoal.simulator.steps.twin import RealSwarm
from shoal.simulator.studies.calibrate import GOAL, compare

ANSWER = 8
"""Tokens of an answer: of some seconds, as long links make it."""


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_swarm_of_processes_and_its_simulated_twin_agree_within_a_tenth():
    two_clients_each = tuple(range(len(ROUTES))) * 2
    with opened() as (swarm, models):
        assert len(swarm.servers) == len(SPANS) == 14
        measured = measure(swarm, models, [two_clients_each], answer=ANSWER, rounds=2)
    (compared,) = compare(RealSwarm.model_validate(measured))
    assert compared.throughput_error == pytest.approx(0, abs=GOAL), measured
    assert compared.latency_error == pytest.approx(0, abs=GOAL), measured
