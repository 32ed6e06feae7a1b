"""A conversation on the terminal, with a model that gives the answer of the test."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from shoal.bundled import STORIES
from shoal.cli.chat import Transcript, converse, parse_line
from shoal.cli.generate import is_cut
from shoal.cli.terminal.wait_note import WaitNote
from shoal.client.generation.generation import Token
from shoal.events import TextDoubtful


@pytest.mark.parametrize(
    ("line", "command", "text"),
    [
        ("hello", None, "hello"),
        (" /new ", "/new", ""),
        ("/help", "/help", ""),
        ("/?", "/help", ""),
        ("/exit", "/bye", ""),
        ("/quit", "/bye", ""),
        ("/bye", "/bye", ""),
        ("/set temperature 1", "/set temperature 1", ""),
        ("//etc/hosts is what?", None, "/etc/hosts is what?"),
        ("and/or", None, "and/or"),
        ("", None, ""),
    ],
)
def test_a_line_with_a_slash_is_a_command_and_two_slashes_send_one(line, command, text):
    assert parse_line(line) == (command, text)


class FakeStream(list[Token]):
    """The tokens of an answer, none of them guessed."""

    num_right = 0


class FakeModel:
    """Gives the same answer to every prompt, and records the prompts."""

    generation_config = SimpleNamespace(eos_token_id=1)

    def __init__(self, answer: list[int]) -> None:
        self.answer = answer
        self.prompts: list[torch.Tensor] = []
        self.num_wanted: list[int] = []

    @contextlib.contextmanager
    def stream(self, ids: torch.Tensor, *, max_new_tokens: int, **_: Any) -> Iterator[FakeStream]:
        self.prompts.append(ids)
        self.num_wanted.append(max_new_tokens)
        *before, last = self.answer
        reason = "stop" if last == self.generation_config.eos_token_id else "length"
        yield FakeStream([*map(Token, before), Token(last, finish_reason=reason)])


class Session:
    """A session that holds no tokens, with `room` for new ones. The n-th answer in it is found `doubtful`, if any."""

    output_ids = attention_mask = None
    num_tokens = 0

    def __init__(self, doubtful: int | None = None, room: int = 1000) -> None:
        self._room = room
        self._num_asked = 0  # it is asked for its doubts before and after an answer
        self._doubtful = doubtful

    @property
    def doubtful(self) -> tuple[TextDoubtful, ...]:
        self._num_asked += 1
        found = TextDoubtful(1, "model", 3, 10, "s0 was found lying")
        return (found,) if self._doubtful is not None and self._num_asked >= 2 * self._doubtful else ()

    def room_after(self, num_tokens: int) -> int:
        return self._room

    def crop(self, num_tokens: int) -> None: ...


Chat = Any


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    """Run a chat with these input lines. Returns the prompts, whether a new conversation follows, and the output."""

    def chat(
        *lines: str,
        answer: str = "Once",
        max_new_tokens: int = 100,
        ended: bool = True,
        doubtful: int | None = None,
        room: int = 1000,
    ) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(STORIES)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        model = FakeModel([*tokenizer(answer)["input_ids"], *([1] if ended else [])])
        capsys.readouterr()
        again = converse(
            model,
            Transcript(tokenizer),
            Session(doubtful, room),
            {"max_new_tokens": max_new_tokens},
            None,
            WaitNote(),  # type: ignore[arg-type]
        )
        out, err = capsys.readouterr()
        prompts = [tokenizer.decode(ids[0], skip_special_tokens=True) for ids in model.prompts]
        return SimpleNamespace(
            prompts=prompts,
            again=again,
            out=out,
            err=err,
            num_tokens=len(model.answer),
            num_wanted=model.num_wanted,
        )

    return chat


def test_commands_never_reach_the_model(chat):
    done = chat("/help", "/set x", "hello")
    assert done.prompts == ["hello"]
    assert done.out == "Once\n"
    assert done.err.count("/new") == done.err.count("/bye") == done.err.count("//") == 2
    assert "unknown command /set x" in done.err


def test_a_command_may_start_a_new_conversation_or_leave(chat):
    assert chat("/new", "hello").again is True
    assert chat("/bye", "hello").again is False
    assert chat("hello").again is False
    assert not chat("/bye", "hello").prompts


def test_a_message_is_answered_again_if_the_user_asks_for_it(chat):
    assert chat("hello", "/again").prompts == ["hello", "hello"]
    assert chat("/again", "hello").prompts == ["hello"]
    assert chat("one", "two", "/again").prompts[-1] == chat("one", "two").prompts[-1]


def test_an_answer_that_a_liar_computed_is_said_to_be_doubtful_once(chat):
    done = chat("one", "two", "three", doubtful=2)
    assert done.out == "Once\nOnce\nOnce\n"
    warning = "warning: the last 7 tokens may be wrong: s0 was found lying\nhint: /again answers once more"
    assert done.err.count("warning") == 1
    assert done.err.startswith(warning)


def test_two_slashes_send_one_to_the_model(chat):
    assert chat("//hello").prompts == ["/hello"]


def test_the_note_on_a_cut_answer_goes_to_stderr(chat):
    whole = chat("hello", answer="Once upon a time")
    assert not whole.err
    cut = chat("hello", answer="Once upon a time", max_new_tokens=whole.num_tokens - 1, ended=False)
    assert cut.out == whole.out == "Once upon a time\n"
    assert cut.err.strip() == f"[cut after {whole.num_tokens - 1} tokens; see --max-new-tokens]"


def test_an_answer_is_cut_where_the_conversation_has_its_full_length(chat):
    full = chat("hello", answer="Once upon a time", ended=False, room=7)
    assert full.num_wanted == [7]
    assert full.err.strip() == "[cut: the conversation has its full length; see --max-length, or /new]"


@pytest.mark.parametrize(
    ("new", "end", "expected"),
    [
        ([5, 6, 7], 1, True),
        ([5, 6, 1], 1, False),
        ([5, 6, 1], [2, 1], False),
        ([5, 6, 7], None, True),
        ([5, 6], None, False),
        ([5, 1, 0], 1, False),
    ],
)
def test_an_answer_is_cut_if_it_reaches_the_limit_without_an_end_token(new, end, expected):
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=end))
    assert is_cut(model, new, max_new_tokens=3) is expected
