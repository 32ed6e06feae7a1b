"""`shoal chat`: a conversation in one session, so that servers compute only the new tokens."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.text import Text

from shoal.cli import options
from shoal.cli.console import print_error, stderr
from shoal.cli.generate import connected, cut_mark, is_cut, pad_token_of, print_now, seed_everything, streamer
from shoal.client.options.client_options import ClientOptions
from shoal.errors import ShoalError

if TYPE_CHECKING:
    import torch

    from shoal.client import InferenceSession

SYSTEM = "system"

COMMANDS = {
    "/new": "begins a new conversation",
    "/bye": "leaves; so do /exit, /quit and Ctrl-D",
    "/help": "shows this; so does /?",
    "Ctrl-C": "stops an answer",
    "//...": "sends /... to the model",
}
SAME = {"/exit": "/bye", "/quit": "/bye", "/?": "/help"}


@options.with_client_options
def command(
    model: options.Model,
    client: ClientOptions,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    system: Annotated[str, typer.Option(metavar="TEXT", help="The system message, before the conversation.")] = "",
    max_length: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Tokens of the whole conversation. Default: up to 2048.")
    ] = None,
) -> None:
    """Talk with a model.

    Ctrl-C stops an answer, Ctrl-D or /bye leaves, /new begins a new conversation, /help lists the commands. A model
    without a chat template continues your text.
    """
    options.check_places(model, client.model.active_adapter)
    chosen = options.sampling(temperature, top_p, top_k, seed)
    with connected(model, client) as (llm, tokenizer):
        seed_everything(seed)
        chosen |= {"max_new_tokens": max_new_tokens, "pad_token_id": pad_token_of(tokenizer)}
        stderr.print(
            Text(
                "Ctrl-C stops an answer, Ctrl-D leaves, /new begins a new conversation, /help lists the commands",
                style="dim",
            )
        )
        while True:
            conversation = ChatHistory(tokenizer, system)
            with llm.inference_session(max_length=max_length) as session:
                if not _converse(llm, conversation, session, chosen):
                    return


def _converse(llm: Any, conversation: ChatHistory, session: InferenceSession, chosen: dict[str, Any]) -> bool:
    """One conversation; returns whether the user wants a new one."""
    while (line := _read_line()) is not None:
        command, said = parsed(line)
        if command in ("/new", "/bye"):
            return command == "/new"
        if command is not None:
            _list_commands(None if command == "/help" else command)
        if not said.strip():
            continue
        ids, cut = conversation.ask(said), False
        printer = streamer(conversation.tokenizer, strip=True)
        try:
            go_back(session, ids)
            answer = llm.generate(ids, session=session, streamer=printer, **chosen)
        except KeyboardInterrupt:
            conversation.answered(printer.text)
            print_now(" …")
        except ShoalError as error:
            conversation.take_back()
            print_now("\n" if printer.text else "")
            print_error(str(error), error.hint)
            continue
        else:
            conversation.answered(printer.text)
            cut = is_cut(llm, answer[0, ids.shape[1] :].tolist(), max_new_tokens=chosen["max_new_tokens"])
        print_now("\n")
        if cut:
            stderr.print(Text(cut_mark(chosen["max_new_tokens"]), style="dim"))
    return False


def parsed(line: str) -> tuple[str | None, str]:
    """The command in a line, or `None`, and the text for the model. Two slashes at the beginning stand for one."""
    text = line.strip()
    if not text.startswith("/"):
        return None, line
    if text.startswith("//"):
        return None, text[1:]
    return SAME.get(text, text), ""


def _list_commands(unknown: str | None) -> None:
    lines = [f"{command:<8}{does}" for command, does in COMMANDS.items()]
    if unknown is not None:
        lines.insert(0, f"there is no command {unknown}")
    stderr.print(Text("\n".join(lines), style="dim"), soft_wrap=True)


class ChatHistory:
    """The messages so far, as tokens: by the tokenizer's chat template, or joined by spaces if it has none."""

    def __init__(self, tokenizer: Any, system: str = "") -> None:
        self.tokenizer = tokenizer
        self.messages = [{"role": SYSTEM, "content": system}] if system else []

    def ask(self, text: str) -> torch.Tensor:
        """Add a message of the user; returns all tokens so far, [1, S], up to where the answer begins."""
        self.messages.append({"role": "user", "content": text})
        if self.tokenizer.chat_template is None:
            said = " ".join(message["content"].strip() for message in self.messages)
            inputs = self.tokenizer(said, return_tensors="pt")
            return cast("torch.Tensor", inputs["input_ids"])
        inputs = self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return cast("torch.Tensor", inputs["input_ids"])

    def answered(self, text: str) -> None:
        """Add an answer of the model."""
        self.messages.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """Remove the last message, which was not answered."""
        self.messages.pop()


def go_back(session: InferenceSession, ids: torch.Tensor) -> None:
    """Set a session back to the last token that it shares with these, [1, S].

    They differ after an interrupted answer, or where the template writes an answer differently than the model did.
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
    """The next line of the user, or `None` at the end of the input."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None
    import readline  # noqa: F401 - input() has a history and editing with it

    while True:
        try:
            return input("\n> ")
        except KeyboardInterrupt:
            print_now("\n")
        except EOFError:
            print_now("\n")
            return None
