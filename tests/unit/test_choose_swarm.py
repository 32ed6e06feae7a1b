"""`shoal join` without a code: what is listed, and what the answers do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import typer

from shoal.cli import INTERRUPTED, run
from shoal.cli import join as join_command
from shoal.cli.nearby.choose_swarm import choose, described, hear_swarms, listed
from shoal.cli.terminal import console
from shoal.cli.terminal.console import WrongUsage
from shoal.errors import SwarmError
from shoal.joining import heard_swarms
from shoal.joining.heard_swarms import HeardSwarm
from shoal.joining.invitation import Invitation

from .lan_in_memory import HOME, LanInMemory, announcement

INVITATION = Invitation("real", "llama-12x64-1a2b3c4d", "f" * 32, "bfloat16", "nf4")


def swarm(name: str = "stories", **changes: object) -> HeardSwarm:
    said = announcement(model=name)
    return replace(HeardSwarm(said.code.digest, said.code.ways, said, 1), **changes)  # type: ignore[arg-type]


A, B, C = swarm("a"), swarm("b"), swarm("c")


class User:
    """Answers one question after another."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    def __call__(self, question: str) -> str:
        self.asked.append(question)
        return self.answers.pop(0)


def test_what_only_members_say_is_marked_as_said() -> None:
    assert described(swarm()) == "says it is stories, float32: 1 member heard"
    checked = swarm(invitation=INVITATION, num_members=3, missing=(0, 1, 6))
    assert described(checked) == "real, bfloat16, nf4: 3 members heard; they lack blocks 0:2, 6:7"


def test_each_swarm_is_listed_with_the_line_that_joins_it() -> None:
    lines = listed([A, B], num_more=4)
    assert lines == [
        "Swarms on the local network:",
        *("  1  says it is a, float32: 1 member heard", f"     shoal join {A.code()}"),
        *("  2  says it is b, float32: 1 member heard", f"     shoal join {B.code()}"),
        *("     and 4 more", ""),
    ]


@pytest.mark.parametrize("answer", ["", "y", "Y", "yes", " YES ", "1"])
def test_the_only_swarm_is_joined_after_a_yes(answer: str) -> None:
    user = User(answer)
    assert choose([A], yes=False, ask=user) is A
    assert user.asked == ["Join it? [Y/n] "]


@pytest.mark.parametrize(("answers", "chosen"), [(["2"], B), (["", "y", "0", "4", "-1", "²", "3" * 9000, " 3 "], C)])
def test_one_of_several_is_chosen_by_its_number(answers: list[str], chosen: HeardSwarm) -> None:
    user = User(*answers)
    assert choose([A, B, C], yes=False, ask=user) is chosen
    assert user.asked == ["Which one? [1-3, n for none] "] * len(answers)


@pytest.mark.parametrize("swarms", [[A], [A, B]])
@pytest.mark.parametrize("answer", ["n", "N", "no", "q"])
def test_a_user_may_want_none(swarms: list[HeardSwarm], answer: str) -> None:
    with pytest.raises(typer.Exit) as end:
        choose(swarms, yes=False, ask=User(answer))
    assert end.value.exit_code == 0


def ends(failure: type[BaseException]) -> Callable[[str], str]:
    def ask(question: str) -> str:
        raise failure

    return ask


def test_the_end_of_the_input_chooses_none_and_ctrl_c_comes_through() -> None:
    with pytest.raises(typer.Exit):
        choose([A], yes=False, ask=ends(EOFError))
    with pytest.raises(KeyboardInterrupt):
        choose([A], yes=False, ask=ends(KeyboardInterrupt))


def test_without_a_terminal_no_swarm_is_chosen() -> None:
    for swarms in ([A], [A, B]):
        with pytest.raises(WrongUsage, match="stdin is not a terminal") as refused:
            choose(swarms, yes=False, ask=None)
        assert "--yes takes the only one" in str(refused.value.hint)


def test_yes_takes_the_only_swarm_and_none_of_several() -> None:
    assert choose([A], yes=True, ask=None) is A
    with pytest.raises(WrongUsage, match="2 swarms are heard"):
        choose([A, B], yes=True, ask=None)


def test_a_user_who_hears_nothing_learns_what_may_be_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heard_swarms, "NOTHING_SECONDS", 0.0)
    with pytest.raises(SwarmError, match=r"no swarm is heard on the local network \(192\.168\.1\.0/24\)") as nothing:
        hear_swarms(LanInMemory(), [HOME])
    assert "UDP port 5353" in str(nothing.value.hint)
    with pytest.raises(SwarmError, match="in no local network") as alone:
        hear_swarms(LanInMemory(), [])
    assert "shoal join CODE" in str(alone.value.hint)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The codes of the swarms that `shoal join` serves in, in place of serving."""
    served: list[str] = []
    monkeypatch.setattr(join_command.serve, "command", lambda **values: served.append(values["model"]))
    logger = logging.getLogger("shoal")
    before = logger.handlers, logger.level, logger.propagate
    yield served
    logger.handlers, logger.propagate = before[0], before[2]
    logger.setLevel(before[1])
    console.PROGRESS.setLevel(logging.NOTSET)


def test_a_join_without_a_code_serves_in_the_swarm_that_was_chosen(
    commands: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join_command, "choose_swarm", lambda *, yes: A.code() if yes else B.code())
    assert run(["join", "--yes"]) == 0
    assert commands == [str(A.code())]


def test_ctrl_c_at_the_question_ends_the_command(commands: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join_command, "choose_swarm", lambda *, yes: choose([A], yes=yes, ask=ends(KeyboardInterrupt)))
    assert run(["join"]) == INTERRUPTED
    assert commands == []


def test_a_wrong_option_is_told_before_anything_is_listened_for(
    commands: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(join_command, "choose_swarm", lambda *, yes: pytest.fail("it listens"))
    assert run(["join", "--blocks", "all"]) == 2
    assert run(["join", "--blocks", "0:4", "--num-blocks", "4"]) == 2
    assert run(["join", "--host", "localhost"]) == 2
    assert capsys.readouterr().err.count("error: ") == 3
    assert commands == []
