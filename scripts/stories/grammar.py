"""A grammar that writes short stories for children.

A template is text with two marks. `[a|b|c]` is a choice, and choices nest; `{slot}` is filled from the cast of the
story, and what fills it may hold choices of its own. Earlier options are likelier than later ones: a model that has
learnt the grammar then has a clear favourite at every fork, and decodes the same text greedily whatever the rounding.

A story draws its cast, opens, tells a little about its hero, follows one plot of `plots.py` and ends.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from stories.plots import PHRASES, PLOTS

GIRLS = ("Lily", "Mia", "Anna", "Rosie", "Ella", "Molly", "Daisy", "Clara", "Nora", "Ruby", "Zoe", "Hazel")
BOYS = ("Tim", "Ben", "Max", "Sam", "Leo", "Jack", "Oliver", "Toby", "Finn", "Hugo", "Oscar", "Peter")
CHILDREN = 0.5  # the share of heroes that are a girl or a boy; the others, and all friends, are animals
ANIMALS = (
    "fox", "rabbit", "mouse", "bear", "cat", "dog", "squirrel", "hedgehog",
    "pony", "lamb", "badger", "deer", "goat", "mole",
)  # fmt: skip

# Where a story happens: in, to, and by what name.
PLACES = (
    ("in the forest", "to the forest", "forest"),
    ("by the river", "to the river", "river"),
    ("in the garden", "to the garden", "garden"),
    ("in the park", "to the park", "park"),
    ("on the hill", "to the hill", "hill"),
    ("by the lake", "to the lake", "lake"),
    ("in the meadow", "to the meadow", "meadow"),
    ("on the farm", "to the farm", "farm"),
    ("by the sea", "to the sea", "sea"),
    ("in the village", "to the village", "village"),
)

NATURE = "[little|small|young|kind|brave|happy|gentle|clever|shy|curious|cheerful]"

OPENINGS = (
    f"Once upon a time, there was a {NATURE} {{kind}} named {{hero}}. {{He}} lived {{home}}.",
    f"Once upon a time, there was a {NATURE} {{kind}} who lived {{home}}. {{His}} name was {{hero}}.",
    f"Once upon a time, a {NATURE} {{kind}} named {{hero}} lived {{home}}.",
    f"Once upon a time, {{at}}, there lived a {NATURE} {{kind}} named {{hero}}.",
    f"There once was a {NATURE} {{kind}} named {{hero}}. {{He}} lived {{home}}.",
    f"Long ago, a {NATURE} {{kind}} named {{hero}} lived {{home}}.",
    f"{{hero}} was a {NATURE} {{kind}}. {{He}} lived {{home}}.",
    f"In a [quiet|small] village by the [sea|forest|river], there lived a {NATURE} {{kind}} named {{hero}}.",
)

HOME = (
    "in a [small|little|cozy|warm|red|white] house [near the {place}|{at}|by the road|with a green door]",
    "{at} with {his} [mother|family|grandmother|mother and father|two brothers|little sister]",
    "in a [small|quiet] village [near the {place}|far away]",
    "{at}",
)

HABITS = (
    "{He} loved to [play {at}|sing songs|play with {his} friends|run and jump|look at the stars|tell stories].",
    "Every [day|morning|evening], {he} [walked|went|ran] {to} [to play|to look at the birds|with a smile].",
    "Everyone {at} [liked|loved] {hero} because {he} was [kind|always happy|good to everyone].",
    "{He} liked [flowers|apples|sunny days|rainy days|stories|warm bread] very much.",
    "",
)

ENDINGS = (
    "[From that day on|After that day], {hero} [always remembered|never forgot|knew] that {moral}.",
    "{hero} [learned|had learned] that {moral}.",
    "[From that day on|After that day], {hero} and {friend} were [best friends|the best of friends].",
    "That [night|evening], {hero} went to [bed|sleep] with a [smile|happy heart]. {He} knew that {moral}.",
    "{hero} and {friend} [played together every day|lived happily ever after].",
    "And so {hero} learned that {moral}. The end.",
)

Option = TypeVar("Option")

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")
_VOWEL = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])")


@dataclass(frozen=True)
class Character:
    name: str
    kind: str
    is_girl: bool

    def slots(self, prefix: str, name: str) -> dict[str, str]:
        """The character's words: the name under `name`, kind and pronouns under `prefix` plus the male word."""
        he, him, his = ("she", "her", "her") if self.is_girl else ("he", "him", "his")
        words = {"kind": self.kind, "he": he, "him": him, "his": his}
        slots = {prefix + slot: word for slot, word in words.items()}
        slots |= {(prefix + slot).capitalize(): words[slot].capitalize() for slot in ("he", "his")}
        return slots | {name: self.name}


def pick(rng: Random, options: Sequence[Option]) -> Option:
    """One of the options; earlier ones are likelier."""
    return rng.choices(options, weights=[1 / (rank + 2) for rank in range(len(options))])[0]


def expand(rng: Random, template: str, slots: dict[str, str]) -> str:
    """The template with its choices made, innermost first, and its slots filled."""
    while _CHOICE.search(template) or _SLOT.search(template):
        template = _CHOICE.sub(lambda found: pick(rng, found[1].split("|")), template)
        template = _SLOT.sub(lambda found: slots[found[1]], template)
    return template


def write_story(rng: Random) -> str:
    """One story, in one paragraph of about 80 to 200 words."""
    hero = _draw_character(rng, is_child=rng.random() < CHILDREN)
    friend = _draw_character(rng, is_child=False, other=hero)
    plot = pick(rng, PLOTS)
    at, to, place = pick(rng, PLACES)
    slots = PHRASES | hero.slots("", "hero") | friend.slots("f", "friend") | {"at": at, "to": to, "place": place}
    slots |= {"home": pick(rng, HOME), "moral": pick(rng, plot.morals)}
    slots |= dict(zip(plot.slots, pick(rng, plot.rows), strict=True))
    parts = [pick(rng, OPENINGS), pick(rng, HABITS), *plot.beats.strip().splitlines(), pick(rng, ENDINGS)]
    text = " ".join(expand(rng, part, slots) for part in parts)
    return _VOWEL.sub(r"\1n ", re.sub(r" {2,}", " ", text)).strip()


def _draw_character(rng: Random, *, is_child: bool, other: Character | None = None) -> Character:
    """A child or an animal; never with the other's name, nor of the other's kind."""
    is_girl = rng.random() < 0.5
    names = [name for name in (GIRLS if is_girl else BOYS) if other is None or name != other.name]
    kinds = [kind for kind in ANIMALS if other is None or kind != other.kind]
    child = "girl" if is_girl else "boy"
    return Character(pick(rng, names), child if is_child else pick(rng, kinds), is_girl)
