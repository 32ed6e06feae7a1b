"""`shoal generate`: continue one prompt, and stream the text."""

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
from shoal.cli.console import hush_transformers, stderr, stdout, waiting
from shoal.cli.rates import tokens_per_second
from shoal.client.options.client_options import ClientOptions
from shoal.errors import UserError

if TYPE_CHECKING:
    from shoal.client import InferenceSession


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
    num_beams: Annotated[int, typer.Option(min=1, max=64, metavar="N", help="Search with this many beams.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, at the end.")] = False,
) -> None:
    """Continue a prompt, and stream the text to stdout.

    The likeliest token is taken each time, unless a --temperature is given.
    """
    options.check_places(model, client.model.active_adapter)
    if prompt == "-":
        prompt = sys.stdin.read()
    chosen = options.sampling(temperature, top_p, top_k, seed, num_beams)

    with connected(model, client) as (llm, tokenizer):
        inputs = tokenizer(prompt, return_tensors="pt")
        num_prompt = inputs.input_ids.shape[1]
        if not num_prompt:
            raise UserError("the prompt is empty", hint="this model's tokenizer adds no tokens to it: write some text")
        check_length(llm, num_prompt, max_new_tokens)
        streams = num_beams == 1 and not as_json
        seed_everything(seed)
        session: InferenceSession
        with llm.inference_session(max_length=num_prompt + max_new_tokens) as session:
            wait = waiting("Generating") if not streams else contextlib.nullcontext()
            started = time.perf_counter()
            with wait:
                ids = llm.generate(
                    **inputs,
                    **chosen,
                    max_new_tokens=max_new_tokens,
                    session=session,
                    streamer=streamer(tokenizer, prompt=prompt if stdout.is_terminal else "") if streams else None,
                    pad_token_id=pad_token_of(tokenizer),
                )
            seconds = time.perf_counter() - started
            servers = [
                {"peer": hop.server.peer, "name": hop.server.name, "blocks": str(hop.span)} for hop in session.hops
            ]
        num_tokens = ids.shape[1] - num_prompt
        cut = is_cut(llm, ids[0, num_prompt:].tolist(), max_new_tokens=max_new_tokens)
        text = tokenizer.decode(ids[0, num_prompt:], skip_special_tokens=True)
    if as_json:
        answer = {
            "prompt": prompt,
            "text": text,
            "tokens": ids[0, num_prompt:].tolist(),
            "finish_reason": "length" if cut else "stop",
            "seconds": round(seconds, 3),
            "tokens_per_second": float(f"{num_tokens / seconds:.4g}"),
            "servers": servers,
        }
        print(json.dumps(answer, ensure_ascii=False))
        return
    print_now("\n" if streams else f"{text}\n")
    route = ", ".join(f"{server['name'] or server['peer'][-6:]} {server['blocks']}" for server in servers)
    if cut:
        stderr.print(Text(cut_mark(max_new_tokens), style="dim"))
    rate = tokens_per_second(num_tokens / seconds)
    stderr.print(Text(f"{num_tokens} tokens in {seconds:.1f} s, {rate}, through {route}", style="dim"))


@contextlib.contextmanager
def connected(model: str, client: ClientOptions) -> Iterator[tuple[Any, Any]]:
    """The model in the swarm, and its tokenizer. The client leaves the swarm at the end of the context."""
    with waiting("Importing PyTorch and Transformers") as wait:
        from shoal.client import AutoDistributedModelForCausalLM

        hush_transformers()
        wait.for_("Joining the swarm and loading the model's head", spin=Path(model).expanduser().is_dir())
        llm = AutoDistributedModelForCausalLM.from_options(model, client)
    try:
        yield llm, load_tokenizer(model, client.model.revision)
    finally:
        llm.close()


def load_tokenizer(model: str, revision: str | None = None) -> Any:
    """The model's tokenizer. Raises `UserError`."""
    from transformers import AutoTokenizer

    folder = Path(model).expanduser()
    try:
        return AutoTokenizer.from_pretrained(folder if folder.is_dir() else model, revision=revision or "main")
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{model} has no tokenizer that can be read: {reason}",
            hint="the folder must hold tokenizer.json, or another tokenizer that Transformers knows",
        ) from error


def streamer(tokenizer: Any, *, prompt: str = "", strip: bool = False) -> Any:
    """Prints the prompt and then the generated text, word by word; its `text` is what was printed.

    With `strip`, without the spaces at the beginning.
    """
    from transformers import TextStreamer

    class Printer(TextStreamer):  # type: ignore[misc]
        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if not self.text:
                text = text.lstrip() if strip else text
                print_now(prompt if text else "", style="dim")
            self.text += text
            print_now(text)

    return Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def print_now(text: str, style: str = "") -> None:
    """Print exactly this text, and flush."""
    if style and stdout.is_terminal:
        stdout.print(Text(text, style=style), end="", soft_wrap=True)
    else:
        sys.stdout.write(text)
    sys.stdout.flush()


def is_cut(llm: Any, new: list[int], *, max_new_tokens: int) -> bool:
    """Whether the text ends at the length limit, and not with the model's end-of-text token."""
    end = llm.generation_config.eos_token_id
    ends = set() if end is None else {end} if isinstance(end, int) else set(end)
    return len(new) >= max_new_tokens and ends.isdisjoint(new)


def cut_mark(max_new_tokens: int) -> str:
    return f"[cut at {max_new_tokens} tokens: --max-new-tokens]"


def check_length(llm: Any, num_tokens: int, max_new_tokens: int) -> None:
    """Raises `UserError` if the prompt and the new tokens are more than the model allows."""
    longest = getattr(llm.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and num_tokens + max_new_tokens > longest:
        raise UserError(
            f"{num_tokens} tokens and {max_new_tokens} new ones are more than the {longest} that this model allows",
            hint=f"--max-new-tokens {longest - num_tokens}" if longest > num_tokens else "shorten the prompt",
        )


def pad_token_of(tokenizer: Any) -> int:
    """The padding token for `generate()`. Without one, Transformers would log its choice at every call."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return 0 if found is None else int(found)


def seed_everything(seed: int | None) -> None:
    """Make sampling repeatable."""
    if seed is not None:
        import torch

        torch.manual_seed(seed)
