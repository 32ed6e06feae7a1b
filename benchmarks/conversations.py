"""What clients say in a soak, and what they have to be answered: the tokens of plain Transformers on one machine."""

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
"""Two logits that are closer may change places when others are computed in the same pass."""
VOCABULARY = range(3, 1000)
COMMON = tuple(range(10, 42))
"""Half of the conversations begin with it."""


@dataclass(frozen=True)
class Turn:
    """What a client says, and the tokens that have to follow."""

    said: tuple[int, ...]
    answer: tuple[int, ...]


Conversation = tuple[Turn, ...]


def conversations(model: Path, count: int, *, seed: int) -> list[Conversation]:
    """So many of one to four turns, with first prompts of 1 to 250 tokens, answered greedily in float32.

    Where the model hesitates between two tokens, a conversation is left out: what rounding decides proves nothing.
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
        said = (*common, *(chance.choice(VOCABULARY) for _ in range(chance.randint(1, longest))))
        past += said
        answer = _answer(whole, past, chance.randint(4, 48))
        past += answer
        yield Turn(said, tuple(answer))


def _answer(whole: Any, past: list[int], num_tokens: int) -> list[int]:
    """So many tokens; none if one of them is a near tie."""
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


def write_conversations(path: Path, talks: Sequence[Conversation]) -> None:
    path.write_text(json.dumps([[asdict(turn) for turn in turns] for turns in talks]))


def read_conversations(path: Path) -> list[Conversation]:
    return [
        tuple(Turn(tuple(turn["said"]), tuple(turn["answer"])) for turn in turns)
        for turns in json.loads(path.read_text())
    ]
