"""Conversations of a soak test, with the expected answers: the tokens of plain Transformers on one machine."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

NEAR_TIE = 1e-3
"""Two logits that are closer than this may swap places when the pass also has other tokens."""
VOCABULARY = range(3, 1000)
COMMON = tuple(range(10, 42))
"""Half of the conversations begin with this prefix."""


@dataclass(frozen=True)
class Turn:
    """The tokens that a client sends, and the expected answer."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


Conversation = tuple[Turn, ...]


def conversations(model: Path, count: int, *, seed: int) -> list[Conversation]:
    """`count` conversations of one to four turns, with first prompts of 1 to 250 tokens and greedy answers in float32.

    A conversation with a near tie between two tokens is left out, because rounding would decide it.
    """
    chance = random.Random(seed)
    whole = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()
    found: list[Conversation] = []
    while len(found) < count:
        turns = tuple(_turns(whole, chance))
        if all(turn.answer for turn in turns):
            found.append(turns)
    return found


def _turns(whole: Any, chance: random.Random) -> Iterator[Turn]:
    past: list[int] = []
    for index in range(chance.choice((1, 1, 2, 3, 4))):
        common = COMMON if index == 0 and chance.random() < 0.5 else ()
        longest = chance.choice((1, 16, 60, 250)) if index == 0 else 12
        prompt = (*common, *(chance.choice(VOCABULARY) for _ in range(chance.randint(1, longest))))
        past += prompt
        answer = _answer(whole, past, chance.randint(4, 48))
        past += answer
        yield Turn(prompt, tuple(answer))


def _answer(whole: Any, past: list[int], num_tokens: int) -> list[int]:
    """The next `num_tokens` tokens; empty if one of them is a near tie."""
    prompt = torch.tensor([past])
    output = whole.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best_T2 = torch.cat(output.logits).topk(2).values
    if (best_T2[:, 0] - best_T2[:, 1]).min() < NEAR_TIE:
        return []
    answer: list[int] = output.sequences[0, len(past) :].tolist()
    return answer


def write_conversations(path: Path, script: Sequence[Conversation]) -> None:
    path.write_text(json.dumps([[asdict(turn) for turn in turns] for turns in script]))


def read_conversations(path: Path) -> list[Conversation]:
    return [
        tuple(Turn(tuple(turn["prompt"]), tuple(turn["answer"])) for turn in turns)
        for turns in json.loads(path.read_text())
    ]
