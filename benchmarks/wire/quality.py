"""What lossy encodings of hidden states do to a real model's text.

    python -m benchmarks.wire.quality [--model FOLDER] [--text FILE] [--servers 2 4 8]

Blocks are cut into spans of equal length, one for each server, and hidden states are rounded wherever they travel: to
each server, and from the last one to the client. All is computed here, in float32, by plain Transformers with shoal's
own encodings; the reference rounds nothing. Besides those that shoal has, forms with 4 bits are tried: even steps in
blocks of 64 or 32 values with a common peak, and the same after a rotation, which spreads outliers over their block.

The text is what the model writes itself at temperature 1, or the beginning of a file. Without a folder, the model is
the bundled one.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common.machine import describe_machine
from benchmarks.inversion.attack import Change
from benchmarks.inversion.defenses import changed_at, cost_of, layers_of, written_by
from shoal.bundled import STORIES
from shoal.host.processes import interruptible
from shoal.net.wire.encodings import as_received

NUM_TEXTS = 32
NUM_TOKENS = 128
FOUR_BITS = 7
"""The steps of 4 bits between 0 and the peak."""


def in_four_bits(hidden_NTD: Tensor, *, block: int, rotated: bool) -> Tensor:
    """What a receiver would decode. With `rotated`, blocks are rotated before they are rounded, and back afterwards."""
    values = hidden_NTD.unflatten(-1, (-1, block))
    rotation = hadamard(block) if rotated else torch.eye(block)
    turned = values @ rotation
    peaks = turned.abs().amax(-1, keepdim=True).to(torch.bfloat16).float().clamp(min=torch.finfo(torch.float32).tiny)
    rounded = (turned * FOUR_BITS / peaks).round().clamp(-FOUR_BITS, FOUR_BITS) * peaks / FOUR_BITS
    return (rounded @ rotation.T).flatten(-2)


def hadamard(size: int) -> Tensor:
    """An orthogonal matrix of equal sizes; `size` is a power of two."""
    found = torch.ones(1, 1)
    while len(found) < size:
        found = torch.cat((torch.cat((found, found), 1), torch.cat((found, -found), 1)))
    return found / math.sqrt(size)


WAYS: dict[str, tuple[float, Change]] = {
    "bfloat16": (16, partial(as_received, encoding="bfloat16")),
    "int8": (8.25, partial(as_received, encoding="int8")),
    "4 bits, blocks of 64": (4.25, partial(in_four_bits, block=64, rotated=False)),
    "4 bits, blocks of 32": (4.5, partial(in_four_bits, block=32, rotated=False)),
    "4 bits, blocks of 64, rotated": (4.25, partial(in_four_bits, block=64, rotated=True)),
    "4 bits, blocks of 32, rotated": (4.5, partial(in_four_bits, block=32, rotated=True)),
}
"""Each with its bits for a value."""


def texts_of(model: object, folder: Path, file: Path | None) -> Tensor:
    """The texts [N, T]."""
    if file is None:
        return torch.cat([*written_by(model, NUM_TEXTS, NUM_TOKENS, seed=1)])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(file.read_text(), return_tensors="pt")["input_ids"][0]
    num = min(NUM_TEXTS, len(ids) // NUM_TOKENS)
    if num == 0:
        raise SystemExit(f"{file} has {len(ids)} tokens, and {NUM_TOKENS} are needed")
    return ids[: num * NUM_TOKENS].view(num, NUM_TOKENS)


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=STORIES)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--servers", type=int, nargs="+", default=[2, 4])
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    load = partial(AutoModelForCausalLM.from_pretrained, options.model, dtype=torch.float32)
    model, public = load().eval(), load().eval()
    texts_NT = texts_of(public, options.model, options.text)
    layers = layers_of(model)
    whole = cost_of(model, public, texts_NT)
    print(describe_machine())
    print(f"{options.model.name}, {len(layers)} blocks, {texts_NT.numel()} tokens, perplexity {whole.perplexity:.3f}\n")
    print("| encoding | bits a value | servers | perplexity | times | next tokens changed | KL |")
    print("|---|---|---|---|---|---|---|")
    for name, (bits, change) in WAYS.items():
        for servers in options.servers:
            with ExitStack() as hooks:
                for server in range(1, servers):
                    hooks.enter_context(changed_at(layers[server * len(layers) // servers], change))
                hooks.callback(layers[-1].register_forward_hook(returning(change)).remove)
                cost = cost_of(model, public, texts_NT, depth=0, change=change)
            figures = f"{cost.perplexity:.3f} | {cost.perplexity / whole.perplexity:.4f}"
            print(
                f"| {name} | {bits} | {servers} | {figures} | {cost.changed:.2%} | {cost.divergence:.2g} |", flush=True
            )


def returning(change: Change) -> Callable[[object, object, Tensor], Tensor]:
    """A hook that changes what a layer returns."""
    return lambda _, __, hidden_NTD: change(hidden_NTD)


if __name__ == "__main__":
    main()
