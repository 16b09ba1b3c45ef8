"""Reading the text form of a pattern (grammar.lark); writing it is `str(pattern)`. Nothing is evaluated as
Python.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from splatc.errors import InvalidInput, PatternSyntaxError
from splatc.patterns import blocks, heads, library, neighborhood, pruned
from splatc.patterns.base import Pattern, transpose
from splatc.patterns.reader import Token, Tree, Unreadable, read_tree

if TYPE_CHECKING:
    from lark import Lark

NAMES: dict[str, Callable[..., Pattern]] = {
    "full": library.Full,
    "causal": library.Causal,
    "window": library.Window,
    "dilated": library.Dilated,
    "strided": library.Strided,
    "fixed": library.Fixed,
    "global_rows": library.GlobalRows,
    "global_cols": library.GlobalCols,
    "sink": library.Sink,
    "prefix": library.Prefix,
    "longformer": library.Longformer,
    "documents": library.documents,
    "blocked": blocks.Blocked,
    "block_window": blocks.BlockWindow,
    "block_mask": blocks.block_mask,
    "random_blocks": blocks.RandomBlocks,
    "bigbird": blocks.BigBird,
    "neighborhood": neighborhood.neighborhood,
    "nm": pruned.nm,
    "per_head": heads.per_head,
    "per_batch": heads.per_batch,
    "after": neighborhood.after,
    "transpose": transpose,
}
_LITERALS = {"True": True, "False": False, "true": True, "false": False, "None": None}
_WORDS = {"and": "&", "or": "|", "not": "~"}
_DATA = {"mask": "mask(array)", "sparse": "as_pattern(scipy_array)"}  # printed, but not readable
_MAX_DEPTH = 64  # nested brackets
_EXCERPT = 72  # characters of the text quoted in an error

# What the parser's terminals are called in messages.
_TERMINALS = {
    "NAME": "a pattern",
    "INT": "a number",
    "STRING": "a string",
    "LSQB": "'['",
    "RSQB": "']'",
    "LPAR": "'('",
    "RPAR": "')'",
    "VBAR": "'|'",
    "AMPERSAND": "'&'",
    "TILDES": "'~'",
    "COMMA": "','",
    "EQUAL": "'='",
    "$END": "the end",
}


def parse(text: str) -> Pattern:
    """The pattern that `text` describes, such as "causal & (window(256, 0) | strided(128))".

    Names and arguments are the functions of `splatc.patterns`; `causal` is `causal()`. parse(str(p)) == p for
    every pattern whose text form holds all of it. Raises PatternSyntaxError, which quotes the text with a
    caret.
    """
    if not isinstance(text, str):
        raise InvalidInput(f"parse: expected the text of a pattern, not a {type(text).__name__}")
    return _Reader(re.sub(r"\s", " ", text)).read()


@lru_cache(maxsize=1)
def _parser() -> Lark:
    from lark import Lark

    source = Path(__file__).with_name("grammar.lark").read_text(encoding="utf-8")
    return Lark(source, parser="lalr", lexer="basic", maybe_placeholders=False, propagate_positions=True)


class _Reader:
    """One text being read: evaluates the tree bottom-up, keeping columns for messages."""

    def __init__(self, text: str) -> None:
        self.text = text

    def read(self) -> Pattern:
        self._bound_depth()
        try:
            tree = read_tree(self.text)
        except Unreadable:
            self._explain()
        return self.pattern(tree)

    def _explain(self) -> NoReturn:
        """Let Lark find what is wrong with the text."""
        from lark.exceptions import UnexpectedCharacters, UnexpectedEOF, UnexpectedToken

        try:
            _parser().parse(self.text)
        except UnexpectedCharacters as e:
            self._bad_character(int(e.pos_in_stream or 0))
        except UnexpectedToken as e:
            self._bad_token(e)
        except UnexpectedEOF:
            self.fail(len(self.text), "the text ends too early")
        raise AssertionError(f"grammar.lark and reader.py differ about {self.text!r}")

    def fail(self, column: int, message: str) -> NoReturn:
        """Raises PatternSyntaxError with an excerpt of the text and a caret below `column` (0-based)."""
        lo = max(0, column - _EXCERPT * 2 // 3)
        hi = min(len(self.text), lo + _EXCERPT)
        before, after = ("... " if lo else ""), (" ..." if hi < len(self.text) else "")
        caret = " " * (column - lo + len(before)) + "^"
        raise PatternSyntaxError(
            f"column {column + 1}: {message}\n  {before}{self.text[lo:hi]}{after}\n  {caret}"
        )

    def _bound_depth(self) -> None:
        depth = 0
        for column, c in enumerate(self.text):
            depth += (c in "([") - (c in ")]")
            if depth > _MAX_DEPTH:
                self.fail(column, f"more than {_MAX_DEPTH} nested brackets")

    def _bad_character(self, at: int) -> NoReturn:
        c = self.text[at]
        if c == "<":
            self.fail(
                at, "<...> stands for data that text cannot hold: load it with splatc.patterns.load_mask"
            )
        if c in "\"'":
            self.fail(at, "this string has no closing quote")
        if c == "." and self.text[:at][-1:].isdigit():
            self.fail(at, "numbers here are whole numbers of positions, without a decimal point")
        hint = {
            "!": "write ~ for not",
            "-": "write a & ~b for difference",
            "^": "write (a | b) & ~(a & b)",
        }.get(c)
        self.fail(at, f"unexpected {c!r}" + (f"; {hint}" if hint else ""))

    def _bad_token(self, e: Any) -> NoReturn:
        token = e.token
        end = token.type == "$END"
        at = len(self.text.rstrip()) if end else int(token.start_pos or 0)
        if str(token) in _WORDS:
            self.fail(at, f"write {_WORDS[str(token)]} for {str(token)!r}")
        previous = re.search(r"[A-Za-z_]\w*\s*$", self.text[:at])
        if previous and previous.group().strip() in _WORDS:
            word = previous.group().strip()
            self.fail(previous.start(), f"write {_WORDS[word]} for {word!r}")
        if token in ("&", "|") and self.text[:at].rstrip()[-1:] == token:
            self.fail(at, f"write a single {token}")
        expected = sorted({_TERMINALS.get(t, t) for t in e.accepts or e.expected})
        found = "the text ends here" if end else f"unexpected {str(token)!r}"
        self.fail(at, f"{found}; expected {_either(expected)}")

    def pattern(self, tree: Tree) -> Pattern:
        """Evaluates a tree that must be a pattern."""
        value = self.value(tree)
        if not isinstance(value, Pattern):
            self.fail(_column(tree), f"{_source(self.text, tree)} is not a pattern")
        return value

    def value(self, tree: Tree) -> Any:
        """Evaluates a tree: a pattern, or an argument (int, str, bool, None, list, tuple)."""
        kids: list[Any] = tree.children
        match tree.data:
            case "either":
                return self._fold(kids, lambda a, b: a | b)
            case "both":
                return self._fold(kids, lambda a, b: a & b)
            case "negated":
                inner = self.pattern(kids[1])
                return ~inner if kids[0].count("~") % 2 else inner
            case "group":
                return self.value(kids[0])
            case "number":
                if len(kids[0]) > 20:
                    self.fail(_column(tree), "this number is too large")
                return int(kids[0])
            case "string":
                return str(kids[0][1:-1])
            case "list" | "tuple":
                items = [self.value(x) for k in kids for x in (k.children if k.data == "items" else [k])]
                return items if tree.data == "list" else tuple(items)
            case "name":
                if kids[0] in _LITERALS:
                    return _LITERALS[kids[0]]
                return self._call(kids[0], [], {})
            case "call":
                return self._call(kids[0], *self._arguments(kids[1].children if len(kids) > 1 else []))
        raise AssertionError(tree.data)

    def _fold(self, kids: list[Tree], op: Callable[[Pattern, Pattern], Pattern]) -> Pattern:
        out = self.pattern(kids[0])
        for kid in kids[1:]:
            right = self.pattern(kid)
            try:
                out = op(out, right)
            except InvalidInput as e:  # per-head patterns of different numbers of heads
                self.fail(_column(kid), str(e))
        return out

    def _arguments(self, trees: list[Tree]) -> tuple[list[Any], dict[str, Any]]:
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for tree in trees:
            if tree.data == "keyword":
                name, value = str(tree.children[0]), tree.children[1]
                if name in kwargs:
                    self.fail(_column(tree), f"{name} is given twice")
                kwargs[name] = self.value(value)  # type: ignore[arg-type]
            elif kwargs:
                self.fail(_column(tree), "an argument without a name follows one with a name")
            else:
                args.append(self.value(tree))
        return args, kwargs

    def _call(self, token: Token, args: list[Any], kwargs: dict[str, Any]) -> Pattern:
        name, at = str(token), token.start_pos
        if name in _DATA:
            self.fail(at, f"{name} holds data and has no text form: make it in Python with {_DATA[name]}")
        if name not in NAMES:
            close = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]!r}?" if close else f"the patterns are {', '.join(NAMES)}"
            self.fail(at, f"unknown pattern {name!r}; {hint}")
        make = NAMES[name]
        signature = inspect.signature(make)
        try:
            signature.bind(*args, **kwargs)
        except TypeError as e:
            self.fail(at, f"{name}{_plain(signature)}: {e}")
        try:
            return make(*args, **kwargs)
        except InvalidInput as e:
            self.fail(at, str(e))


def _plain(signature: inspect.Signature) -> str:
    """The signature without annotations: (left, right, align='top_left')."""
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))


def _either(options: list[str]) -> str:
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"


def _column(tree: Tree) -> int:
    return tree.start_pos


def _source(text: str, tree: Tree) -> str:
    return text[tree.start_pos : tree.end_pos]


def looks_like_path(text: str) -> bool:
    """Whether `text` is meant as a file: it has a known suffix or a directory separator, and no call."""
    if re.search(r"\.(npy|npz|mtx|pt|pth|txt|splat)$", text.strip(), re.IGNORECASE):
        return True
    return (os.sep in text or "/" in text) and "(" not in text
