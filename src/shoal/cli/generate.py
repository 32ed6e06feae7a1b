"""`shoal generate`: continue one prompt, and print the text as it is generated."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from shoal.cli import options
from shoal.cli.terminal.console import hush_transformers, print_warning, stderr, stdout, tokens_per_second, waiting
from shoal.cli.terminal.wait_note import WaitNote
from shoal.client.options.client_options import ClientOptions
from shoal.errors import UserError
from shoal.host.large_imports import large_imports
from shoal.joining.invite_code import is_code

if TYPE_CHECKING:
    from shoal.client import InferenceSession


GENERATING = "Generating"


@options.with_client_options
def command(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue; - reads it from stdin.")],
    client: ClientOptions,
    max_new_tokens: options.MaxNewTokens = 64,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    num_beams: Annotated[int, typer.Option(min=1, max=64, metavar="N", help="Beam search with this many beams.")] = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end, instead of the text.")
    ] = False,
) -> None:
    """Continue a prompt, and stream the text to stdout.

    Decoding is greedy, unless --temperature, --top-p or --top-k asks for sampling.
    """
    options.check_places(model, client.model.active_adapter, revision=client.model.revision)
    if prompt == "-":
        prompt = sys.stdin.read()
    chosen = options.sampling(temperature, top_p, top_k, seed, num_beams)

    note = WaitNote()
    with connected(model, note.observing(client)) as (llm, tokenizer):
        inputs = tokenizer(prompt, return_tensors="pt")
        num_prompt = inputs.input_ids.shape[1]
        if not num_prompt:
            raise UserError(
                "the prompt is empty", hint="this model's tokenizer adds no tokens of its own: give at least one word"
            )
        check_length(llm, num_prompt, max_new_tokens)
        streams = num_beams == 1 and not as_json
        session: InferenceSession
        with llm.inference_session(max_length=num_prompt + max_new_tokens) as session:
            progress = waiting(GENERATING) if not streams else contextlib.nullcontext()
            options_of_all = {**chosen, "max_new_tokens": max_new_tokens, "pad_token_id": pad_token_of(tokenizer)}
            printer = streamer(tokenizer, note, prompt=prompt if stdout.is_terminal else "") if streams else None
            started = time.perf_counter()
            with progress as reporter, note.during(reporter, task=GENERATING):
                if num_beams == 1:
                    new, cut, num_right = say(
                        llm, inputs.input_ids, printer, session=session, seed=seed, **options_of_all
                    )
                else:
                    seed_everything(seed)
                    found = llm.generate(**inputs, **options_of_all, session=session)
                    new = found[0, num_prompt:].tolist()
                    cut, num_right = is_cut(llm, new, max_new_tokens=max_new_tokens), 0
            seconds = time.perf_counter() - started
            servers = [
                {"peer": hop.server.peer, "name": hop.server.name, "blocks": str(hop.span)} for hop in session.hops
            ]
            doubts = doubts_about(session)
        text = tokenizer.decode(new, skip_special_tokens=True)
    if as_json:
        answer = {
            "prompt": prompt,
            "text": text,
            "tokens": new,
            "finish_reason": "length" if cut else "stop",
            "seconds": round(seconds, 3),
            "tokens_per_second": float(f"{len(new) / seconds:.4g}"),
            "servers": servers,
            "doubts": doubts,
        }
        print(json.dumps(answer, ensure_ascii=False))
        return
    print_now("\n" if streams else f"{text}\n")
    route = ", ".join(f"{server['name'] or server['peer'][-6:]} {server['blocks']}" for server in servers)
    if cut:
        stderr.print(Text(cut_mark(max_new_tokens), style="dim"))
    if doubts:
        print_warning(doubts, "generate it again: the server is not used any more")
    rate = tokens_per_second(len(new) / seconds)
    guessed = f", {num_right} of them guessed ahead" if num_right else ""
    stderr.print(Text(f"{len(new)} tokens in {seconds:.1f} s, {rate}, through {route}{guessed}", style="dim"))


def say(llm: Any, ids: Any, printer: Any, **options: Any) -> tuple[list[int], bool, int]:
    """Generate after `ids` [1, S], and show the tokens as they come.

    Returns them, whether the text was cut, and how many of them were guessed ahead.
    """
    import torch

    new: list[int] = []
    cut = False
    if printer is not None:
        printer.put(ids)
    with llm.stream(ids, **options) as stream:
        for token in stream:
            new.append(token.id)
            cut = token.finish_reason == "length"
            if printer is not None:
                printer.put(torch.tensor([token.id]))
    if printer is not None:
        printer.end()
    return new, cut, stream.num_right


@contextlib.contextmanager
def connected(model: str, client: ClientOptions) -> Iterator[tuple[Any, Any]]:
    """The model in the swarm, and its tokenizer. The client leaves the swarm at the end of the context."""
    with waiting("Importing PyTorch and Transformers") as progress:
        with large_imports():
            from shoal.client import AutoDistributedModelForCausalLM

            hush_transformers()
        progress.show("Joining the swarm and loading the model's head", spin=Path(model).expanduser().is_dir())
        llm = AutoDistributedModelForCausalLM.from_options(model, client)
    try:
        commit = getattr(llm.config, "_commit_hash", None)  # that of the weights, if they are from the hub
        yield llm, load_tokenizer(llm.name_or_path if is_code(model) else model, commit or client.model.revision)
    finally:
        llm.close()


def load_tokenizer(model: str, revision: str | None = None) -> Any:
    """The model's tokenizer. Raises `UserError`."""
    from transformers import AutoTokenizer

    folder = Path(model).expanduser()
    try:
        # Never code that comes with a model: the files may have come from members of the swarm.
        if folder.is_dir():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        return AutoTokenizer.from_pretrained(model, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the tokenizer of {model} cannot be loaded: {reason}",
            hint="the model needs tokenizer.json, or other tokenizer files that Transformers can load",
        ) from error


def streamer(tokenizer: Any, note: WaitNote, *, prompt: str = "", strip: bool = False) -> Any:
    """A streamer that prints the prompt, and then each word once it is complete. Its `text` is the text so far.

    It hides the `note` before it prints. With `strip`, it leaves out the space at the beginning of the text.
    """
    from transformers import TextStreamer

    class Printer(TextStreamer):  # type: ignore[misc]
        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            note.hide()
            if not self.text:
                text = text.lstrip() if strip else text
                print_now(prompt if text else "", style="dim")
            self.text += text
            print_now(text)

    return Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def print_now(text: str, style: str = "") -> None:
    """Write exactly this text to stdout, and flush it."""
    if style and stdout.is_terminal:
        stdout.print(Text(text, style=style), end="", soft_wrap=True)
    else:
        sys.stdout.write(text)
    sys.stdout.flush()


def is_cut(llm: Any, new: list[int], *, max_new_tokens: int) -> bool:
    """Whether the new tokens stop at the length limit, and not with an end-of-sequence token."""
    end = llm.generation_config.eos_token_id
    ends = set() if end is None else {end} if isinstance(end, int) else set(end)
    return len(new) >= max_new_tokens and ends.isdisjoint(new)


def cut_mark(max_new_tokens: int) -> str:
    """The note below a text that was cut."""
    return f"[cut after {max_new_tokens} tokens; see --max-new-tokens]"


def doubts_about(session: InferenceSession, *, since: int = 0) -> str:
    """What is to be said of a text if a server was found lying since the session had `since` doubts; else nothing."""
    return "; ".join(dict.fromkeys(each.line for each in session.doubtful[since:]))


def check_length(llm: Any, num_tokens: int, max_new_tokens: int) -> None:
    """Raises `UserError` if prompt and new tokens together are more than the model supports."""
    longest = getattr(llm.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and num_tokens + max_new_tokens > longest:
        raise UserError(
            f"{num_tokens} prompt tokens and {max_new_tokens} new tokens exceed the {longest} that this model supports",
            hint=f"--max-new-tokens {longest - num_tokens}" if longest > num_tokens else "shorten the prompt",
        )


def pad_token_of(tokenizer: Any) -> int:
    """The token to pad with. Without one, Transformers chooses one and warns at every call."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return 0 if found is None else int(found)


def seed_everything(seed: int | None) -> None:
    """Seed PyTorch's random numbers, unless `seed` is None."""
    if seed is not None:
        import torch

        torch.manual_seed(seed)
