"""Which texts a draft model guesses for in the same passes.

    alone       W W W W        each pass reads the weights W for one text
    together    W              one reads them for four, and each text counts as long as the longest

The time of a pass of few tokens is that of the numbers it touches: the weights once, and what is kept of the texts. So
passes together are cheaper, but for texts of very different lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ROW = 0.1
"""What one token's products with the weights cost of what reading the weights does: the others are for free."""
TOUCHES = 3
"""How often a pass touches what is kept of a text: it is read and written where it grows, and read by attention."""
LAYER = 200_000
"""What a layer costs however few tokens there are, in numbers that could be touched while its kernels are begun."""


@dataclass(frozen=True)
class ModelSize:
    """A model has this many `weights` and layers, and keeps this many numbers of each token of a text, `kept`."""

    weights: int
    num_layers: int
    kept: int


@dataclass(frozen=True)
class Reading:
    """A text of `length` tokens, of which the model has not read the last `num_new`, and is to guess `count` more."""

    length: int
    num_new: int
    count: int


def cost(model: ModelSize, texts: Sequence[Reading]) -> float:
    """What guesses for these texts cost in the same passes, in numbers that are touched.

    There are as many passes as the text has guesses that has the most, and the others leave before. In each, all texts
    are as long as the longest; in the first, all have as many new tokens as the one with the most. Several texts are
    copied into one batch before, and what is new out of it afterwards.
    """
    longest = max(each.length for each in texts)
    num_passes = max(each.count for each in texts)
    num_rows = len(texts) * max(each.num_new for each in texts) + sum(each.count - 1 for each in texts)
    touched = TOUCHES * longest * sum(each.count for each in texts)
    if len(texts) > 1:
        touched += 2 * len(texts) * longest + 2 * sum(each.length for each in texts)
    every_pass = model.weights + LAYER * model.num_layers
    return num_passes * every_pass + ROW * num_rows * model.weights + model.kept * touched


def share_passes(model: ModelSize, texts: Sequence[Reading]) -> list[list[int]]:
    """The texts, by their indices, in groups that have their passes together.

    From the longest on, each joins those with which it costs the least more, or begins a group if it costs less alone.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(texts)), key=lambda each: (-texts[each].length, -texts[each].num_new)):
        alone = cost(model, [texts[index]])
        found, least = None, alone
        for group in groups:
            members = [texts[each] for each in group]
            more = cost(model, [*members, texts[index]]) - cost(model, members)
            if more < least:
                found, least = group, more
        if found is None:
            groups.append([index])
        else:
            found.append(index)
    return groups
