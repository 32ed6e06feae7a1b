"""A server reads the prompt: the attack, and what noise, local blocks and secret blocks gain and cost.

    python -m benchmarks.inversion [--model FOLDER] [--only depth noise ends secret] [--tokens 32]

It needs nothing but the model: what a server receives is computed as a swarm would, with shoal's own encodings. Without
a folder, the model is the bundled one. The figures are parts of the tokens of all prompts that were read right.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common.machine import describe_machine
from benchmarks.inversion.attack import Blocks, Change, Reader, received, sent
from benchmarks.inversion.defenses import (
    Cost,
    Noise,
    changed_at,
    cost_of,
    layers_of,
    learned_map,
    secret_copy,
    written_by,
)
from shoal.bundled import STORIES
from shoal.cli.terminal.console import stderr
from shoal.host.processes import interruptible
from shoal.tensors import Encoding

PROMPTS = (
    "My bank is at 12 Mill Road, and the password is hunter2. Do not tell this to anyone, not even to Lily or Tim.",
    "Patient: Jane Doe, born 1974-03-09. Diagnosis: diabetes, type 2. She asks whether she may stop her treatment now.",
    "Dear Sir, with this letter I give notice of the end of my contract 88-1204 as of the thirty-first of December.",
    "def key():\n    return 'sk-4fJ9xQ7LmZ'  # TODO: move this to the environment before we publish the repository",
    "Once upon a time, there was a little girl named Mia. She lived in a small house near the forest with her mother.",
    "Wir treffen uns am Montag um 9 Uhr im Hotel Adler, Zimmer 304. Bring die Papiere mit, und komm bitte allein.",
)
NUM_RANDOM = 2
"""Prompts of random tokens, beside those above: no guess about the text helps with these."""
DEPTHS = (0, 1, 2, 4, 8, 16)
WIRES: tuple[tuple[str, torch.dtype, Encoding], ...] = (
    ("float32", torch.float32, "raw"),
    ("bfloat16", torch.bfloat16, "raw"),
    ("bfloat16, sent as int8", torch.bfloat16, "int8"),
)
NOISE = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Sizes of noise, relative to each vector's own size."""
ENDS = (0, 1, 2, 4)
BF16_BYTES = 2
SECRET_BLOCKS = 2
SECRET_STEPS = 120
KNOWN = (256, 4096)
"""Tokens of known text, by which a server that has not got the secret weights learns what they do."""


@dataclass
class Bench:
    """The model, the prompts, and the text on which costs are measured."""

    folder: Path
    num_tokens: int

    @cached_property
    def public(self) -> Any:
        """The model in float32, as every member has it."""
        return self.model_in(torch.float32)

    def model_in(self, dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype).eval().requires_grad_(False)

    @cached_property
    def prompts(self) -> list[Tensor]:
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        found = [tokenizer(text, return_tensors="pt")["input_ids"][0][: self.num_tokens] for text in PROMPTS]
        random = torch.Generator().manual_seed(0)
        num_known = self.public.get_input_embeddings().num_embeddings
        return [*found, *(torch.randint(num_known, (self.num_tokens,), generator=random) for _ in range(NUM_RANDOM))]

    @cached_property
    def texts(self) -> Tensor:
        """The text of the model itself, [32, 128]: its perplexity is the least that it can have."""
        return torch.cat([*written_by(self.public, 32, 128, seed=1)])

    @property
    def depths(self) -> list[int]:
        return [depth for depth in DEPTHS if depth < len(layers_of(self.public))]

    def part_read(self, what: str, read: Callable[[Tensor], Tensor]) -> float:
        """The part of all prompts' tokens that `read` finds."""
        began = time.monotonic()
        right = num = 0
        for index, ids_T in enumerate(self.prompts):
            right += int((read(ids_T) == ids_T).sum())
            num += len(ids_T)
            seconds = time.monotonic() - began
            note(f"{what}: prompt {index + 1} of {len(self.prompts)}, {right} of {num} tokens read, {seconds:.0f} s")
        return right / num


def note(line: str) -> None:
    stderr.print(line, highlight=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    print(f"\n{title}\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


def percent(part: float) -> str:
    return f"{100 * part:.1f} %" if 0 < part < 1 else f"{100 * part:.0f} %"


def of_cost(cost: Cost) -> tuple[str, str, str]:
    return f"{cost.perplexity:.2f}", percent(cost.changed), f"{cost.divergence:.3g}"


def depth(bench: Bench) -> None:
    """How much is read at each depth, in each form in which hidden states travel."""
    found: dict[int, list[str]] = {depth: [] for depth in bench.depths}
    for name, dtype, wire in WIRES:
        model = bench.model_in(dtype)
        for depth, row in found.items():
            blocks, reader = Blocks(model, depth), Reader(bench.public, depth)
            part = bench.part_read(
                f"{name}, block {depth}", lambda ids, b=blocks, r=reader, w=wire: r.read(received(b, ids, w))
            )
            row.append(percent(part))
    table(
        "Tokens of the prompt that a server reads, by its first block and by what travels",
        ["first block", *(name for name, _, _ in WIRES)],
        [(depth, *row) for depth, row in found.items()],
    )


def noise(bench: Bench) -> None:
    """How much is read through noise, and what the noise does to the text."""
    rows: list[tuple[object, ...]] = [("none", "", "", *of_cost(cost_of(bench.public, bench.public, bench.texts)))]
    for depth in [each for each in (0, 4) if each in bench.depths]:
        blocks, reader = Blocks(bench.public, depth), Reader(bench.public, depth)
        for strength in NOISE:
            change = Noise(strength, torch.Generator().manual_seed(1))
            part = bench.part_read(
                f"noise {strength:g} before block {depth}",
                lambda ids, b=blocks, r=reader, c=change: r.read(received(b, ids, "raw", change=c)),
            )
            drawn = Noise(strength, torch.Generator().manual_seed(2))
            cost = cost_of(bench.public, bench.public, bench.texts, depth=depth, change=drawn)
            rows.append((f"{strength:g}", depth, percent(part), *of_cost(cost)))
    table(
        "Noise that the client adds to what it sends, and has computed the blocks before itself",
        ["noise", "before block", "prompt read", "perplexity", "next tokens changed", "KL"],
        rows,
    )


def ends(bench: Bench) -> None:
    """What is read if the client computes the first and last blocks itself, with weights that all have."""
    layers = layers_of(bench.public)
    rows = []
    for num in [each for each in ENDS if 2 * each < len(layers)]:
        weights = 2 * num * sum(each.numel() for each in layers[0].parameters())
        rows.append(
            (
                num,
                percent(_answers_read(bench, num)),
                percent(2 * num / len(layers)),
                f"{weights * BF16_BYTES / 1e6:.1f} MB",
            )
        )
    table(
        "The first and last blocks on the client, with public weights; sent as int8",
        ["blocks at each end", "next tokens read", "of all blocks' work", "more weights, bf16"],
        rows,
    )


@torch.inference_mode()
def _answers_read(bench: Bench, num: int) -> float:
    """The part of likeliest next tokens that the last server finds, which computes the client's last blocks itself."""
    ids_NT = bench.texts[:8]
    expected = bench.public(ids_NT).logits.argmax(-1)
    if num == 0:
        return 1.0  # it has the output of the last block, as the client has it
    with changed_at(layers_of(bench.public)[-num], lambda hidden: sent(hidden, "int8")):
        found = bench.public(ids_NT).logits.argmax(-1)
    return float((found == expected).float().mean())


def secret(bench: Bench) -> None:
    """What is read if the first blocks are the client's own, with weights that no one else has."""
    texts = torch.cat([*written_by(bench.public, 256, 64, seed=3)])
    known_texts = torch.cat([*written_by(bench.public, 64, 64, seed=4)])
    reader, public_blocks = Reader(bench.public, SECRET_BLOCKS), Blocks(bench.public, SECRET_BLOCKS)
    rows = []
    for name, options in {
        "fine-tuned": {"from_random": False, "with_embeddings": False},
        "trained from random weights, embeddings too": {"from_random": True, "with_embeddings": True},
    }.items():
        model = secret_copy(
            bench.public,
            texts,
            num_blocks=SECRET_BLOCKS,
            num_steps=SECRET_STEPS,
            tell=lambda line, name=name: note(f"{name}: {line}"),
            **options,
        ).eval()
        blocks = Blocks(model, SECRET_BLOCKS)
        with torch.inference_mode():
            pairs = [(received(blocks, ids, "raw"), received(public_blocks, ids, "raw")) for ids in known_texts]
        theirs, ours = (torch.cat(each) for each in zip(*pairs, strict=True))
        maps: list[Change] = [lambda got: got, *(learned_map(theirs[:num], ours[:num]) for num in KNOWN)]
        parts = [
            percent(
                bench.part_read(
                    f"{name}, map {index}", lambda ids, b=blocks, m=each: reader.read(m(received(b, ids, "raw")))
                )
            )
            for index, each in enumerate(maps)
        ]
        cost = cost_of(model, bench.public, bench.texts)
        rows.append((name, *parts, *of_cost(cost)))
        note(f"{name}: done")
    table(
        f"The first {SECRET_BLOCKS} blocks on the client, with secret weights",
        [
            "blocks",
            "read",
            *(f"read, {num:,} tokens of text known" for num in KNOWN),
            "perplexity",
            "next tokens changed",
            "KL",
        ],
        rows,
    )


PARTS: dict[str, Callable[[Bench], None]] = {"depth": depth, "noise": noise, "ends": ends, "secret": secret}


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=STORIES)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tokens", type=int, default=32, help="how many tokens of each prompt are sent")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    bench = Bench(arguments.model, arguments.tokens)
    print(f"{describe_machine()}; {arguments.model.name}, {len(bench.prompts)} prompts")
    for name in arguments.only:
        PARTS[name](bench)


if __name__ == "__main__":
    main()
