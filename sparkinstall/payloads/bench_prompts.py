"""Prompts for a benchmark: prose and code of any length, the same for the same name each time.

Each begins with its name, so that no two have a block of the prefix cache in common.
"""

import random
from collections.abc import Callable

VERSION = 2
"""Of the texts: results of different ones are not compared."""

SUBJECTS = (
    *("The harbour master", "An old clerk", "The night train", "Her younger brother", "The keeper of the mill"),
    *("A patient surveyor", "The council", "The last ferry", "A letter from the coast", "The gardener"),
    *("The apprentice", "A grey heron", "The bell of the chapel", "The doctor's carriage", "Nobody in the village"),
)
VERBS = (
    *("waited for", "had forgotten", "remembered", "could not explain", "wrote a long account of", "passed"),
    *("spoke quietly of", "was afraid of", "came back to", "counted", "carried", "laughed at", "looked after"),
)
OBJECTS = (
    *("the broken bridge", "a box of maps", "the price of salt", "the winter of that year", "three silver coins"),
    *("the road to the north", "an empty house", "the sound of the river", "a debt of long standing"),
    *("the orchard behind the wall", "two tired horses", "the light in the upper window", "a promise"),
)
ENDS = (
    *("before the rain began", "although it was late", "as if nothing had happened", "and said no more about it"),
    *("while the others slept", "because there was no other way", "for the second time", "until the spring"),
    *("without asking anyone", "and the dog followed", "in spite of the cold", "as the custom was"),
)
NAMES = (
    *("batch", "buffer", "config", "cursor", "entry", "index", "item", "node", "order", "page", "queue", "record"),
    *("result", "row", "shard", "state", "table", "token", "user", "weight"),
)
FUNCTIONS = (
    'def load_{a}(path: str) -> list[str]:\n    """Return the lines of a {a} that are not empty."""\n'
    "    with open(path) as handle:\n        return [line.strip() for line in handle if line.strip()]\n",
    "def merge_{a}_with_{b}({a}: dict[str, int], {b}: dict[str, int]) -> dict[str, int]:\n    merged = dict({a})\n"
    "    for key, value in {b}.items():\n        merged[key] = merged.get(key, 0) + value\n    return merged\n",
    "class {A}{B}:\n    def __init__(self, {a}: int, {b}: int = {n}) -> None:\n        self.{a} = {a}\n"
    "        self.{b} = {b}\n\n    def total(self) -> int:\n        return self.{a} * {n} + self.{b}\n",
    "def first_{a}(values: list[int]) -> int | None:\n    for place, value in enumerate(values):\n"
    "        if value > {n} and place % 2 == 0:\n            return value\n    return None\n",
    "def test_{a}_keeps_its_{b}() -> None:\n    {a} = make_{a}({b}={n})\n    assert {a}.{b} == {n}\n"
    "    {a}.update({b}={n} + 1)\n    assert {a}.{b} != {n}\n",
)


def prose(drawn: random.Random) -> str:
    """Return a sentence."""
    return f"{drawn.choice(SUBJECTS)} {drawn.choice(VERBS)} {drawn.choice(OBJECTS)} {drawn.choice(ENDS)}. "


def code(drawn: random.Random) -> str:
    """Return a function, a class or a test in Python."""
    a, b = drawn.choice(NAMES), drawn.choice(NAMES)
    text = drawn.choice(FUNCTIONS).replace("{A}", a.title()).replace("{B}", b.title())
    return text.replace("{a}", a).replace("{b}", b).replace("{n}", str(drawn.randrange(2, 1000))) + "\n\n"


KINDS: dict[str, Callable[[random.Random], str]] = {"prose": prose, "code": code}


def name_of(seed: int, number: int) -> str:
    """Return the name of a prompt of a run. What distinguishes it is within 16 characters, the shortest block."""
    return f"{number}-{seed}"


def text(kind: str, name: str, characters: int) -> str:
    """Return at least so many characters of a kind. The name is all that decides which."""
    drawn = random.Random(f"{kind} {name}")
    begin = f"# {name}\n\n" if kind == "code" else f"{name}. "
    parts, length = [begin], len(begin)
    while length < characters:
        parts.append(KINDS[kind](drawn))
        length += len(parts[-1])
    return "".join(parts)
