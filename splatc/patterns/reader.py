"""The tree of a pattern's text, as grammar.lark has it: read here because Lark takes longer to load than a plan takes.

Lark reads what this does not, to say what is wrong with it (text.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""(?P<TILDES>~(?:\s*~)*) | (?P<NAME>[A-Za-z_][A-Za-z_0-9]*) | (?P<INT>-?[0-9]+(?:_[0-9]+)*)
    | (?P<STRING>"[^"\n]*"|'[^'\n]*') | (?P<MARK>[|&()\[\],=]) | (?P<WS>[ ]+)""",
    re.VERBOSE,
)
_LEAVES = {"NAME": "name", "INT": "number", "STRING": "string"}


class Unreadable(Exception):
    """The text is not in the grammar."""


class Token(str):
    """A word of the text. kind: its terminal, a mark itself; start_pos, end_pos: where it stands."""

    __slots__ = ("end_pos", "kind", "start_pos")
    kind: str
    start_pos: int
    end_pos: int


@dataclass(frozen=True)
class Tree:
    """A rule and what it matched: trees and the tokens that matter."""

    data: str
    children: list[Tree | Token]
    start_pos: int
    end_pos: int


def read_tree(text: str) -> Tree:
    """The expression that ``text``, without white space but spaces, holds. Raises Unreadable."""
    parser = _Parser(_tokens(text))
    tree = parser.either()
    parser.take("END")
    return tree


def _tokens(text: str) -> list[Token]:
    tokens, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise Unreadable
        if match.lastgroup != "WS":
            tokens.append(_token(match[0], str(match.lastgroup), at))
        at = match.end()
    return [*tokens, _token("", "END", at)]


def _token(word: str, kind: str, at: int) -> Token:
    token = Token(word)
    token.kind = word if kind == "MARK" else kind
    token.start_pos, token.end_pos = at, at + len(word)
    return token


class _Parser:
    """Recursive descent: a method for each rule."""

    def __init__(self, tokens: list[Token]) -> None:
        self._tokens = tokens
        self._at = 0

    def _next(self, ahead: int = 0) -> str:
        return self._tokens[min(self._at + ahead, len(self._tokens) - 1)].kind

    def take(self, kind: str) -> Token:
        """The next token, which must be of this kind."""
        token = self._tokens[self._at]
        if token.kind != kind:
            raise Unreadable
        self._at += kind != "END"
        return token

    def either(self) -> Tree:
        kids = [self._both()]
        while self._next() == "|":
            self.take("|")
            kids.append(self._both())
        return kids[0] if len(kids) == 1 else _around("either", kids)

    def _both(self) -> Tree:
        kids = [self._negation()]
        while self._next() == "&":
            self.take("&")
            kids.append(self._negation())
        return kids[0] if len(kids) == 1 else _around("both", kids)

    def _negation(self) -> Tree:
        return _around("negated", [self.take("TILDES"), self._atom()]) if self._next() == "TILDES" else self._atom()

    def _atom(self) -> Tree:
        kind = self._next()
        if kind in ("(", "["):
            return self._bracket(kind)
        if kind not in _LEAVES:
            raise Unreadable
        token = self.take(kind)
        if kind != "NAME" or self._next() != "(":
            return _around(_LEAVES[kind], [token])
        self.take("(")
        arguments = [] if self._next() == ")" else [_around("arguments", self._listed(")", self._argument))]
        return Tree("call", [token, *arguments], token.start_pos, self.take(")").end_pos)

    def _bracket(self, kind: str) -> Tree:
        start, closing = self.take(kind).start_pos, {"(": ")", "[": "]"}[kind]
        data, kids = "list" if kind == "[" else "tuple", list[Tree | Token]()
        if kind == "(" and self._next() != closing:
            kids.append(self.either())
            data = "tuple" if self._next() == "," else "group"
            if data == "tuple":
                self.take(",")
        if data != "group" and self._next() != closing:
            kids.append(_around("items", self._listed(closing, self.either)))
        return Tree(data, kids, start, self.take(closing).end_pos)

    def _listed(self, closing: str, one: Callable[[], Tree]) -> list[Tree]:
        """One or more, with commas between them and maybe behind."""
        kids = [one()]
        while self._next() == ",":
            self.take(",")
            if self._next() == closing:
                break
            kids.append(one())
        return kids

    def _argument(self) -> Tree:
        if self._next() != "NAME" or self._next(1) != "=":
            return self.either()
        name = self.take("NAME")
        self.take("=")
        return _around("keyword", [name, self.either()])


def _around(data: str, kids: Sequence[Tree | Token]) -> Tree:
    return Tree(data, list(kids), kids[0].start_pos, kids[-1].end_pos)
