"""How long a draft model takes to guess for several texts, in the same passes and one text after another.

    python -m benchmarks.joint_drafts [--model MODEL] [--texts 8] [--lengths 100 300 600] [--count 4] [--new 2]
                                      [--rounds 5] [--dtype float32] [--quick]

MODEL is a folder; "smollm2" is a Llama of the shape of SmolLM2-135M with random weights, which takes the time that the
real one takes. Each text has `--new` tokens that the model has not read. All texts have the same length; then, in the
rows "mixed", lengths from a quarter of it up to it. Both ways take turns; the table has medians.

`--quick` only checks that the script runs.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.common.machine import describe_machine
from shoal.bundled import STORIES_DRAFT
from shoal.client.generation.drafting.drafter import Source
from shoal.client.generation.drafting.model_drafter import DraftModel, ModelDrafter
from shoal.client.generation.drafting.wishes import Wish, grant
from shoal.host.processes import interruptible

SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KIND = Source("model", 0.5)


def opened(name: str, dtype: torch.dtype) -> Any:
    if name == "smollm2":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMOLLM2)).to(dtype).eval()
    return transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()


def measure(draft: DraftModel, lengths: list[int], *, num_new: int, count: int, rounds: int) -> tuple[float, float]:
    """The median seconds of all guesses, together and one text after another."""
    chance = random.Random(0)

    def words(num_tokens: int) -> list[int]:
        return [chance.randrange(draft.num_words) for _ in range(num_tokens)]

    drafters = [ModelDrafter(draft, words(length)) for length in lengths]
    for drafter in drafters:
        while drafter.is_behind:
            drafter.read_piece()
        drafter.guesses(1)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for index in range(2 * rounds + 2):
        for drafter in drafters:
            drafter.append(words(num_new))
        started = time.perf_counter()
        if together := index % 2 == 0:
            for made in grant([Wish(each, KIND, count) for each in drafters]):
                if isinstance(made, Exception):
                    raise made
        else:
            for drafter in drafters:
                drafter.guesses(count)
        if index >= 2:  # the first round warms up
            seconds[together].append(time.perf_counter() - started)
    return statistics.median(seconds[True]), statistics.median(seconds[False])


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", nargs="+", default=[str(STORIES_DRAFT), "smollm2"])
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 300, 600])
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--new", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    models, lengths, rounds = arguments.model, arguments.lengths, arguments.rounds
    if arguments.quick:
        models, lengths, rounds = [str(STORIES_DRAFT)], [20], 1
    print(
        f"{describe_machine()}; load {os.getloadavg()[0]:.1f}; {arguments.texts} texts, {arguments.count} guesses each "
        f"behind {arguments.new} new tokens, {arguments.dtype}, medians of {rounds} rounds\n"
    )
    print("| draft | tokens of a text | together, ms | one after another, ms | ratio |")
    print("|---|---|---|---|---|")
    for name in models:
        draft = DraftModel(opened(name, DTYPES[arguments.dtype]), num_words=2**40)
        if not draft.guesses_together:
            raise SystemExit(f"{name} does not guess for several texts at once")
        for longest in lengths:
            shortest, last = longest // 4, max(1, arguments.texts - 1)
            mixed = [shortest + (longest - shortest) * index // last for index in range(arguments.texts)]
            for text, its in (("", [longest] * arguments.texts), ("mixed, up to ", mixed)):
                joint, apart = measure(draft, its, num_new=arguments.new, count=arguments.count, rounds=rounds)
                print(
                    f"| {Path(name).name} | {text}{longest} | {1e3 * joint:.0f} | {1e3 * apart:.0f} | "
                    f"**{apart / joint:.2f}** |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
