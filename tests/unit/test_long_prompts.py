"""A long prompt beside sessions that decode, on the simulated server, which computes the live engine's passes."""

from __future__ import annotations

from statistics import median

import pytest

from shoal.policy.batching.pass_rules import fair
from shoal.simulator.serving.agenda import Agenda
from shoal.simulator.serving.generations import Generation
from shoal.simulator.serving.one_server import OneServer
from shoal.simulator.serving.server_setup import ServerSetup

NUM_CLIENTS, BEGINS_AT = 8, 5.0
PIECE_TOKENS = 256
"""As clients send a long prompt to several servers."""


def waits_beside(setup: ServerSetup, *, num_tokens: int, away_seconds: float) -> tuple[list[float], list[float]]:
    """Seconds between the tokens of eight clients, before and while a prompt of `num_tokens` is computed."""
    agenda = Agenda()
    server = OneServer(setup, fair, agenda)
    before: list[float] = []
    beside: list[float] = []
    ends: list[float] = []

    def refused() -> None:
        raise AssertionError("there is room for all")

    def job(number: int) -> Generation:
        return Generation(number, 0.0, num_tokens, 1, 1, away_seconds, "", peer=f"client {number}")

    def decode(number: int) -> None:
        session, answered = server.open(job(number)), list[float]()

        def on_answer() -> None:
            if answered and agenda.now > 2.0:  # sessions have come together
                (before if agenda.now < BEGINS_AT else beside).append(agenda.now - answered[-1])
            answered.append(agenda.now)
            agenda.after(away_seconds, lambda: server.submit(session, 1, answer=on_answer, refuse=refused))

        server.submit(session, 128, answer=on_answer, refuse=refused)

    def prefill() -> None:
        session, left = server.open(job(NUM_CLIENTS)), [num_tokens]

        def on_answer() -> None:
            if not left[0]:
                ends.append(agenda.now)
                return
            piece = min(PIECE_TOKENS, left[0])
            left[0] -= piece
            server.submit(session, piece, answer=on_answer, refuse=refused)

        on_answer()

    for number in range(NUM_CLIENTS):
        decode(number)
    agenda.after(BEGINS_AT, prefill)
    agenda.run(until=lambda: bool(ends))
    return before, beside


@pytest.mark.parametrize("away_seconds", [0.01, 0.08, 0.2])
@pytest.mark.parametrize("pair_seconds", [0.0, 1.5e-7, 6e-7])
@pytest.mark.parametrize(("num_tokens", "pass_seconds"), [(4096, 0.05), (4096, 0.15), (16_384, 0.15)])
def test_tokens_beside_a_long_prompt_take_little_more_than_twice_the_usual(
    num_tokens: int, pass_seconds: float, pair_seconds: float, away_seconds: float
):
    setup = ServerSetup(num_pages=4000, pass_seconds=pass_seconds, pair_seconds=pair_seconds)
    before, beside = waits_beside(setup, num_tokens=num_tokens, away_seconds=away_seconds)
    assert median(before) <= 1.3 * (pass_seconds + NUM_CLIENTS * setup.token_seconds + away_seconds)
    assert max(beside) <= 2.5 * median(before)
    assert median(beside) <= 2.1 * median(before)
