"""`shoal chat`: a conversation in one session, so that only what is new is computed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.text import Text

from shoal.cli import options
from shoal.cli.console import print_error, start_logging, stderr
from shoal.cli.generate import connected, cut_mark, is_cut, pad_token_of, print_now, seed_everything, streamer
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
    "//...": "says ... to the model with one slash before it",
}
SAME = {"/exit": "/bye", "/quit": "/bye", "/?": "/help"}


def command(
    model: options.Model,
    initial_peers: options.InitialPeers = None,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    system: Annotated[str, typer.Option(metavar="TEXT", help="What the model is told before the conversation.")] = "",
    max_length: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Tokens of the whole conversation. Default: up to 2048.")
    ] = None,
    adapter: options.Adapter = None,
    dtype: options.ClientDType = options.DType.auto,
    wire: options.OnTheWire = options.Wire.auto,
    history: options.HistoryKept = options.Kept.exact,
    history_memory: options.HistoryMemory = None,
    standby: options.Standby = False,
    pin: options.Pin = None,
    chooser: options.ChooseBy = options.Chooser.shortest,
    remote_head: options.RemoteHead = False,
    head_quantization: options.HeadQuantization = options.Quantization.none,
    revision: options.Revision = None,
    allow_uncertified: options.AllowUncertified = False,
    verbose: options.Verbose = False,
) -> None:
    """Talk with a model.

    Ctrl-C stops an answer, Ctrl-D or /bye leaves, /new begins anew, /help tells more. A model without a chat template
    goes on with what you write, as if it had written it itself.
    """
    start_logging(verbose=verbose)
    peers = options.swarm_peers(initial_peers)
    options.check_places(model, adapter)
    chosen = options.sampling(temperature, top_p, top_k, seed)
    with connected(
        model,
        peers,
        revision=revision,
        active_adapter=adapter,
        dtype=dtype,
        wire=wire,
        history=history,
        history_memory=history_memory,
        standby=standby,
        pinned=options.pins(pin),
        chooser=chooser,
        remote_head=remote_head,
        head_quantization=head_quantization,
        allow_uncertified=allow_uncertified,
    ) as client:
        llm, tokenizer = client
        seed_everything(seed)
        chosen |= {"max_new_tokens": max_new_tokens, "pad_token_id": pad_token_of(tokenizer)}
        stderr.print(Text("Ctrl-C stops an answer, Ctrl-D leaves, /new begins anew, /help tells more", style="dim"))
        while True:
            conversation = Conversation(tokenizer, system)
            with llm.inference_session(max_length=max_length) as session:
                if not _converse(llm, conversation, session, chosen):
                    return


def _converse(llm: Any, conversation: Conversation, session: InferenceSession, chosen: dict[str, Any]) -> bool:
    """Question and answer, until somebody leaves; returns whether another conversation shall follow."""
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
    """The command that a line is, if any, and what it says to the model. Two slashes stand for one that is said."""
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


class Conversation:
    """What was said, and how it reads as tokens: by the tokenizer's chat template, or simply one after the other."""

    def __init__(self, tokenizer: Any, system: str = "") -> None:
        self.tokenizer = tokenizer
        self.messages = [{"role": SYSTEM, "content": system}] if system else []

    def ask(self, text: str) -> torch.Tensor:
        """Add what the user says; returns all tokens so far, [1, S], up to where the answer begins."""
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
        """Add what the model said."""
        self.messages.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """Forget a question that was not answered."""
        self.messages.pop()


def go_back(session: InferenceSession, ids: torch.Tensor) -> None:
    """Take a session back to where it and these tokens part: an interrupted answer, or one that is quoted otherwise."""
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
    """What the user writes next; None at the end."""
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
