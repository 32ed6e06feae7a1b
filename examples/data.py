"""Training texts for the examples, in the style of the bundled stories. A small grammar generates them."""

from collections.abc import Sequence
from random import Random

HEROES = ("Lily", "Mia", "Anna", "Rosie", "Ella", "Tim", "Ben", "Max", "Sam", "Leo")
FRIENDS = ("Daisy", "Ruby", "Hazel", "Oscar", "Toby", "Hugo")
ANIMALS = ("fox", "rabbit", "mouse", "bear", "cat", "dog", "hedgehog", "pony", "lamb", "goat")
PLACES = ("in the forest", "by the river", "in the garden", "in the park", "on the hill", "by the lake", "by the sea")
DAYS = ("One day", "One morning", "One afternoon", "One evening")

GOOD = ("jumped for joy", "laughed and danced", "smiled a big smile", "was very happy", "was safe", "felt much better")
BAD = ("began to cry", "felt very sad", "was lonely", "was afraid", "was lost", "wanted to give up")

QUESTIONS = ("Who?", "With?", "Where?")


def reviews(count: int, *, seed: int) -> list[tuple[str, int]]:
    """Stories of a day. The label says how the day ended: 1 for well, 0 for badly. Earlier events do not count."""
    rng = Random(seed)
    return [_review(rng) for _ in range(count)]


def _review(rng: Random) -> tuple[str, int]:
    ended_well = rng.randrange(2)
    hero, friend, place = rng.choice(HEROES), rng.choice(FRIENDS), rng.choice(PLACES)
    first, last = rng.choice(GOOD + BAD), rng.choice(GOOD if ended_well else BAD)
    return f"{rng.choice(DAYS)}, {hero} {first} {place}. Then {friend} came, and {hero} {last}.", ended_well


def tasks(count: int, *, seed: int, questions: Sequence[str] = QUESTIONS) -> list[dict[str, str]]:
    """Stories of one sentence with a question, as `prompt`, and the answer of one to three words, as `completion`."""
    rng = Random(seed)
    return [_task(rng, rng.choice(questions)) for _ in range(count)]


def _task(rng: Random, question: str) -> dict[str, str]:
    hero, friend, animal, place = (rng.choice(words) for words in (HEROES, FRIENDS, ANIMALS, PLACES))
    met = rng.choice((f"{hero} met {friend} the {animal} {place}.", f"{friend} the {animal} saw {hero} {place}."))
    answer = {"Who?": hero, "With?": friend, "Where?": place}[question]
    return {"prompt": f"{rng.choice(DAYS)}, {met} {question}", "completion": f" {answer}."}
