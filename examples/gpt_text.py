"""Text for train_gpt.py, made up: little documents in which names are given numbers, to be added and recalled later.

    kav is 17. mol is 4.
    the red foxes see a small bird.
    kav plus mol is 21.
    3 6 9 12 15.
    what is kav? 17.

Grammar (who sees whom agrees in number), counting and sums are near-by structure; what a name stands for was said up to
a few thousand characters before.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz0123456789.,?"
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
COLOURS, SIZES = ("red", "grey", "brown", "white"), ("small", "large", "old", "young")
ANIMALS = ("fox", "bird", "bear", "goat", "seal")
VERBS = ("see", "hear", "follow", "find")

Numbers = dict[str, int]  # what each name of a document stands for


def corpus(length: int, seed: int) -> np.ndarray:
    """``length`` characters as uint8 indices into ALPHABET; the same for the same seed."""
    rng = np.random.default_rng(seed)
    parts: list[str] = []
    while sum(map(len, parts)) < length:
        parts += [document(rng) for _ in range(64)]
    table = np.zeros(128, np.uint8)
    table[[ord(c) for c in ALPHABET]] = np.arange(len(ALPHABET))
    return table[np.frombuffer("".join(parts)[:length].encode("ascii"), np.uint8)]


def document(rng: np.random.Generator) -> str:
    """One document, with an empty line after it."""
    numbers = {name(rng): int(rng.integers(1, 50)) for _ in range(rng.integers(3, 7))}
    lines = [" ".join(f"{one} is {number}." for one, number in numbers.items())]
    for kind in rng.integers(0, len(LINES), rng.integers(20, 60)):
        lines.append(LINES[kind](rng, numbers))
    return "\n".join(lines) + "\n\n"


def name(rng: np.random.Generator) -> str:
    """A consonant, a vowel, a consonant."""
    return pick(rng, CONSONANTS) + pick(rng, VOWELS) + pick(rng, CONSONANTS)


def pick(rng: np.random.Generator, among: tuple[str, ...] | str) -> str:
    return among[int(rng.integers(len(among)))]


def known(rng: np.random.Generator, numbers: Numbers) -> str:
    """One of the names of the document."""
    return pick(rng, tuple(numbers))


def recalled(rng: np.random.Generator, numbers: Numbers) -> str:
    one = known(rng, numbers)
    return f"what is {one}? {numbers[one]}."


def added(rng: np.random.Generator, numbers: Numbers) -> str:
    one, other = known(rng, numbers), known(rng, numbers)
    return f"{one} plus {other} is {numbers[one] + numbers[other]}."


def counted(rng: np.random.Generator, numbers: Numbers) -> str:
    step = int(rng.integers(2, 10))
    return " ".join(str(step * i) for i in range(1, int(rng.integers(5, 9)))) + "."


def seen(rng: np.random.Generator, numbers: Numbers) -> str:
    one, two = rng.random(2) < 0.5
    subject, whom = phrase(rng, bool(one)), phrase(rng, bool(two))
    return f"{subject} {pick(rng, VERBS)}{'' if one else 's'} {whom}."


def phrase(rng: np.random.Generator, several: bool) -> str:
    animal = pick(rng, ANIMALS)
    ending = "" if not several else "es" if animal.endswith("x") else "s"
    return f"the {pick(rng, SIZES)} {pick(rng, COLOURS)} {animal}{ending}"


LINES: tuple[Callable[[np.random.Generator, Numbers], str], ...] = (recalled, added, counted, seen)
