"""`shoal chat`: a conversation in one inference session, so that each turn computes only its new tokens."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.text import Text

from shoal.cli import options
from shoal.cli.generate import connected, cut_mark, doubts_about, pad_token_of, print_now, say, streamer
from shoal.cli.terminal.console import print_error, print_warning, stderr
from shoal.cli.terminal.wait_note import WaitNote
from shoal.client.options.client_options import ClientOptions
from shoal.errors import ShoalError

if TYPE_CHECKING:
    import torch

    from shoal.client import InferenceSession

SYSTEM = "system"

COMMANDS = {
    "/new": "start a new conversation",
    "/again": "answer the last message again",
    "/bye": "leave; also /exit, /quit and Ctrl-D",
    "/help": "show this list; also /?",
    "Ctrl-C": "stop an answer",
    "//text": "send /text to the model",
}
FULL = "[cut: the conversation has its full length; see --max-length, or /new]"
ALIASES = {"/exit": "/bye", "/quit": "/bye", "/?": "/help"}


@options.with_client_options
def command(
    model: options.Model,
    client: ClientOptions,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    system: Annotated[str, typer.Option(metavar="TEXT", help="System prompt of the conversation.")] = "",
    max_length: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Limit of the whole conversation, in tokens. Default: up to 2048."),
    ] = None,
) -> None:
    """Chat with a model.

    Ctrl-C stops an answer, Ctrl-D or /bye leaves, /new starts a new conversation, /help lists all commands. A model
    without a chat template simply continues your text.
    """
    options.check_places(model, client.model.active_adapter, revision=client.model.revision)
    chosen = options.sampling(temperature, top_p, top_k, seed)
    note = WaitNote()
    with connected(model, note.observing(client)) as (llm, tokenizer):
        chosen |= {"max_new_tokens": max_new_tokens, "pad_token_id": pad_token_of(tokenizer)}
        stderr.print(Text("Ctrl-C stops an answer, Ctrl-D leaves, /new starts again, /help shows more", style="dim"))
        while True:
            transcript = Transcript(tokenizer, system)
            with llm.inference_session(max_length=max_length) as session:
                if not converse(llm, transcript, session, chosen, seed, note):
                    return


def converse(
    llm: Any,
    transcript: Transcript,
    session: InferenceSession,
    chosen: dict[str, Any],
    seed: int | None,
    note: WaitNote,
) -> bool:
    """Read lines and answer them. Returns True if the user asks for a new conversation, False if they leave."""
    while (line := _read_line()) is not None:
        command, text = parse_line(line)
        if command in ("/new", "/bye"):
            return command == "/new"
        if command == "/again":
            text = transcript.take_back()
        elif command is not None:
            _list_commands(None if command == "/help" else command)
        if not text.strip():
            continue
        ids, cut, num_doubts = transcript.ask(text), False, len(session.doubtful)
        printer = streamer(transcript.tokenizer, note, strip=True)
        try:
            rewind(session, ids)
            with note.during():
                of_answer = None if seed is None else seed + len(transcript.messages)
                room = max(1, session.room_after(ids.shape[1]))  # without room, the session says so
                num_new = min(chosen["max_new_tokens"], room)
                limited = chosen | {"max_new_tokens": num_new}
                _, cut, _ = say(llm, ids, printer, session=session, seed=of_answer, **limited)
        except KeyboardInterrupt:
            transcript.add_answer(printer.text)
            print_now(" …")
        except ShoalError as error:
            transcript.remove_last()
            print_now("\n" if printer.text else "")
            print_error(str(error), error.hint)
            continue
        else:
            transcript.add_answer(printer.text)
        print_now("\n")
        if cut:
            is_full = num_new < chosen["max_new_tokens"]
            stderr.print(Text(FULL if is_full else cut_mark(num_new), style="dim"))
        if doubts := doubts_about(session, since=num_doubts):
            print_warning(doubts, "/again answers once more, without the server")
    return False


def parse_line(line: str) -> tuple[str | None, str]:
    """The command in a line, or None, and the text for the model. A line with two slashes sends the second one."""
    text = line.strip()
    if not text.startswith("/"):
        return None, line
    if text.startswith("//"):
        return None, text[1:]
    return ALIASES.get(text, text), ""


def _list_commands(unknown: str | None) -> None:
    lines = [f"{command:<8}{description}" for command, description in COMMANDS.items()]
    if unknown is not None:
        lines.insert(0, f"unknown command {unknown}; a line that begins with / is a command:")
    stderr.print(Text("\n".join(lines), style="dim"), soft_wrap=True)


class Transcript:
    """The messages so far. They become tokens by the tokenizer's chat template, or else by joining their texts."""

    def __init__(self, tokenizer: Any, system: str = "") -> None:
        self.tokenizer = tokenizer
        self.messages = [{"role": SYSTEM, "content": system}] if system else []

    def ask(self, text: str) -> torch.Tensor:
        """Add a message of the user. Returns the tokens up to the start of the answer, [1, S]."""
        self.messages.append({"role": "user", "content": text})
        if self.tokenizer.chat_template is None:
            text = " ".join(message["content"].strip() for message in self.messages)
            inputs = self.tokenizer(text, return_tensors="pt")
            return cast("torch.Tensor", inputs["input_ids"])
        inputs = self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return cast("torch.Tensor", inputs["input_ids"])

    def add_answer(self, text: str) -> None:
        """Add a message of the model."""
        self.messages.append({"role": "assistant", "content": text})

    def take_back(self) -> str:
        """Remove the last message of the user and its answer. Returns the message; nothing if there is none."""
        text = ""
        while self.messages and self.messages[-1]["role"] != SYSTEM and not text:
            message = self.messages.pop()
            text = message["content"] if message["role"] == "user" else ""
        return text

    def remove_last(self) -> None:
        """Remove a message of the user that was not answered."""
        self.messages.pop()


def rewind(session: InferenceSession, ids: torch.Tensor) -> None:
    """Cut a session to the prefix that it shares with `ids`, [1, S].

    They differ after an interrupted answer, or where the chat template renders an answer with other tokens.
    """
    past = session.output_ids
    num_common = 0
    if past is not None:
        length = min(past.shape[1], ids.shape[1])
        differs = (past[:, :length] != ids[:, :length]).any(dim=0).nonzero()
        num_common = int(differs[0]) if len(differs) else length
        session.output_ids = past[:, :num_common] if num_common else None
        session.attention_mask = session.attention_mask[:, :num_common] if session.attention_mask is not None else None
    session.crop(min(session.num_tokens, num_common))


def _read_line() -> str | None:
    """The next line of the user; None at the end of the input."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None
    import readline  # noqa: F401 - gives input() a history and line editing

    while True:
        try:
            return input("\n> ")
        except KeyboardInterrupt:
            print_now("\n")
        except EOFError:
            print_now("\n")
            return None
