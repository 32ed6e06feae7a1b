"""A grammar that writes short stories for children.

A template is text with two marks. `[a|b|c]` is a choice, and choices nest; `{slot}` is filled from the cast of the
story, and what fills it may hold choices of its own. Earlier options are likelier than later ones: a model that has
learnt the grammar then has a clear favourite at every fork, and decodes the same text greedily whatever the rounding.

A story draws its cast, opens, tells a little about its hero, follows one plot of `plots.py` and ends. A scene is
the cast alone, in a few sentences.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from stories.plots import PHRASES, PLOTS

# Heroes and friends share no name, and a friend is a boy where the hero is a girl: each name, like each pronoun, tells
# who is meant.
HERO_GIRLS = ("Lily", "Mia", "Anna", "Rosie", "Ella")
HERO_BOYS = ("Tim", "Ben", "Max", "Sam", "Leo")
FRIEND_GIRLS = ("Daisy", "Ruby", "Hazel")
FRIEND_BOYS = ("Oscar", "Toby", "Hugo")
NAMES = (*HERO_GIRLS, *HERO_BOYS, *FRIEND_GIRLS, *FRIEND_BOYS)
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

# A scene is its opening and a few of these lines.
SCENE_OPENING = (
    "{day}, [{hero} met|a {kind} named {hero} met|there was a {kind} named {hero}. {He} had a friend,] "
    "{friend} the {fkind}."
)
SCENES = (
    "{hero} [saw|looked at|waved to|smiled at] {friend}.",
    "{friend} [saw|looked at|waved to|smiled at] {hero}.",
    '"[Hello|Good morning|Thank you], {hero}," said {friend}.',
    '"[Hello|Good morning|Thank you], {friend}," said {hero}.',
    "{hero} and {friend} [played {at}|went {to}|laughed].",
    "{hero} {joy}. {He} liked {friend}.",
    "{friend} {joy}. {Fhe} liked {hero}.",
    '"[Look|Come with me]!" said {hero}, and {friend} looked at {him}.',
    '"[Look|Come with me]!" said {friend}, and {hero} looked at {fhim}.',
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
    """A random option. Earlier options are more likely."""
    return rng.choices(options, weights=[1 / (rank + 2) for rank in range(len(options))])[0]


def expand(rng: Random, template: str, slots: dict[str, str]) -> str:
    """The template with its choices made, innermost first, and its slots filled."""
    while _CHOICE.search(template) or _SLOT.search(template):
        template = _CHOICE.sub(lambda found: pick(rng, found[1].split("|")), template)
        template = _SLOT.sub(lambda found: slots[found[1]], template)
    return template


def write_story(rng: Random) -> str:
    """One story, in one paragraph of about 80 to 200 words."""
    hero, friend = _draw_cast(rng)
    plot = pick(rng, PLOTS)
    slots = _slots(rng, hero, friend)
    slots |= {"home": pick(rng, HOME), "moral": pick(rng, plot.morals)}
    slots |= dict(zip(plot.slots, pick(rng, plot.rows), strict=True))
    parts = (pick(rng, OPENINGS), pick(rng, HABITS), *plot.beats.strip().splitlines(), pick(rng, ENDINGS))
    return _tell(rng, parts, slots)


def write_scene(rng: Random) -> str:
    """A few sentences that consist mostly of names. The model learns them first, before stories with a plot."""
    hero, friend = _draw_cast(rng)
    lines = rng.choices(SCENES, k=rng.randint(3, 6))
    return _tell(rng, (SCENE_OPENING, *lines), _slots(rng, hero, friend))


def _draw_cast(rng: Random) -> tuple[Character, Character]:
    """A hero, a child or an animal, and a friend, an animal of another kind and of the other gender."""
    is_girl, is_child = rng.random() < 0.5, rng.random() < CHILDREN
    kind = pick(rng, ANIMALS)
    friend_kind = pick(rng, [other for other in ANIMALS if is_child or other != kind])
    child = "girl" if is_girl else "boy"
    hero = Character(pick(rng, HERO_GIRLS if is_girl else HERO_BOYS), child if is_child else kind, is_girl)
    friend = Character(pick(rng, FRIEND_BOYS if is_girl else FRIEND_GIRLS), friend_kind, not is_girl)
    return hero, friend


def _slots(rng: Random, hero: Character, friend: Character) -> dict[str, str]:
    at, to, place = pick(rng, PLACES)
    return PHRASES | hero.slots("", "hero") | friend.slots("f", "friend") | {"at": at, "to": to, "place": place}


def _tell(rng: Random, parts: Iterable[str], slots: dict[str, str]) -> str:
    text = " ".join(expand(rng, part, slots) for part in parts)
    return _VOWEL.sub(r"\1n ", re.sub(r" {2,}", " ", text)).strip()
