"""ListOps, a task of the Long Range Arena (arXiv:2011.04006), from its grammar: nested minima, maxima, medians and sums
modulo 10 of digits, in prefix form. What a whole expression comes to is one of ten classes.

    [MAX 4 [MIN 7 2 ] 1 [SM 8 5 ] ]   is   4
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np

OPERATORS = {"[MIN": min, "[MAX": max, "[MED": lambda x: int(statistics.median(x)), "[SM": lambda x: sum(x) % 10}
WORDS = ("pad", *map(str, range(10)), *OPERATORS, "]")  # a token is a place in this list
NUMBER = {word: i for i, word in enumerate(WORDS)}
CLASSES = 10


@dataclass(frozen=True)
class Grammar:
    """Lengths of an expression in tokens; most operands of an operator; operators inside each other; the chance that an
    operand is a digit. Defaults: those of the Long Range Arena."""

    shortest: int = 500
    longest: int = 2000
    operands: int = 10
    depth: int = 10
    digit: float = 0.75


class TooLong(Exception):
    """An expression has outgrown the longest."""


def expression(grammar: Grammar, rng: np.random.Generator) -> tuple[list[int], int]:
    """(tokens, value) of a random expression."""
    while True:
        tokens: list[int] = []
        try:
            value = _grow(grammar, rng, tokens, 1)
        except TooLong:
            continue
        if len(tokens) >= grammar.shortest:
            return tokens, value


def _grow(grammar: Grammar, rng: np.random.Generator, tokens: list[int], depth: int) -> int:
    if len(tokens) >= grammar.longest:
        raise TooLong
    if depth > 1 and (depth > grammar.depth or rng.random() < grammar.digit):
        value = int(rng.integers(10))
        tokens.append(NUMBER[str(value)])
        return value
    name = list(OPERATORS)[rng.integers(len(OPERATORS))]
    tokens.append(NUMBER[name])
    count = rng.integers(2, grammar.operands + 1)
    value = OPERATORS[name]([_grow(grammar, rng, tokens, depth + 1) for _ in range(count)])
    tokens.append(NUMBER["]"])
    return value


def evaluate(tokens: list[int]) -> int:
    """What a text of tokens comes to, read from left to right."""
    stack: list[list[Any]] = [[]]
    for word in (WORDS[token] for token in tokens):
        if word in OPERATORS:
            stack.append([word])
        elif word == "]":
            name, *values = stack.pop()
            stack[-1].append(OPERATORS[name](values))
        else:
            stack[-1].append(int(word))
    return stack[0][0]


def dataset(grammar: Grammar, count: int, length: int, seed: int, processes: int = 1,
            shown: Callable[[int], None] = lambda done: None) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(tokens uint8 (count, length), padded with 0; values uint8 (count,)), a function of the first four arguments."""
    if grammar.longest > length:
        raise ValueError(f"expressions of up to {grammar.longest} tokens do not fit into {length}")
    tokens, values = np.zeros((count, length), np.uint8), np.zeros(count, np.uint8)
    one = partial(_example, grammar, seed)
    spawned = get_context("spawn")  # threads of other libraries do not survive a fork
    with ProcessPoolExecutor(processes, spawned) if processes > 1 else nullcontext() as pool:
        examples = pool.map(one, range(count), chunksize=64) if pool else map(one, range(count))
        for i, (text, value) in enumerate(examples):
            tokens[i, : len(text)], values[i] = text, value
            shown(i + 1)
    return tokens, values


def _example(grammar: Grammar, seed: int, number: int) -> tuple[list[int], int]:
    return expression(grammar, np.random.default_rng((seed, number)))
