"""The text form of patterns: reading, writing, and what a mistake is told."""

import random

import pytest

from splatc import patterns as P
from splatc.errors import InvalidInput, PatternSyntaxError
from splatc.patterns.reader import Token, Tree, Unreadable, read_tree
from splatc.patterns.text import NAMES, _parser


@pytest.mark.parametrize(
    "text, pattern",
    [
        ("causal", P.causal()),
        ("causal()", P.causal()),
        ("  causal ( ) ", P.causal()),
        ('causal(align="bottom_right")', P.causal(align="bottom_right")),
        ("causal('bottom_right')", P.causal(align="bottom_right")),
        ("window(1_024, 0)", P.window(1024, 0)),
        ("window(-3, 9)", P.window(-3, 9)),
        ("window(right=0, left=256)", P.window(256, 0)),
        ("window(256, 0,)", P.window(256, 0)),
        ("causal & (window(256,0) | strided(128))", P.causal() & (P.window(256, 0) | P.strided(128))),
        ("causal & window(3,3) | strided(2)", (P.causal() & P.window(3, 3)) | P.strided(2)),
        ("~causal & ~ ~ full", ~P.causal() & P.full()),
        ("~(causal | full)", ~(P.causal() | P.full())),
        ("((causal))", P.causal()),
        ("causal\n  & full", P.causal() & P.full()),
        ("random_blocks(64, 3, seed=3)", P.random_blocks(64, 3, seed=3)),
        ("bigbird", P.bigbird()),
        ("bigbird(window=5, seed=2)", P.bigbird(window=5, seed=2)),
        ("documents([100, 200])", P.documents([100, 200])),
        ("documents((100, 200), kv_lengths=[1, 2])", P.documents([100, 200], kv_lengths=[1, 2])),
        ("documents(cu_seqlens=[0, 100, 300])", P.documents([100, 200])),
        ("documents(ids=[0, 1, 0])", P.documents(ids=[0, 1, 0])),
        ("neighborhood((64,128), 13)", P.neighborhood((64, 128), 13)),
        ("neighborhood((8,), 3, causal=True)", P.neighborhood(8, 3, causal=True)),
        (
            "neighborhood((4, 8, 8), (3, 3, 5), dilation=(1, 2, 1), causal=(True, False, false))",
            P.neighborhood((4, 8, 8), (3, 3, 5), (1, 2, 1), (True, False, False)),
        ),
        ('block_mask(["10", "11"], (64, 32))', P.block_mask([[1, 0], [1, 1]], (64, 32))),
        ("block_mask([[1, 0], [1, 1]], 64)", P.block_mask([[1, 0], [1, 1]], 64)),
        ("per_head([causal, window(3, 3) & causal])", P.per_head([P.causal(), P.window(3, 3) & P.causal()])),
        ("causal & nm(2,4)", P.causal() & P.nm(2, 4)),
        ("nm(1, 2) & (sink(4) | window(9, 0)) & causal", (P.sink(4) | P.window(9, 0)) & P.causal() & P.nm(1, 2)),
        ("(full | causal) & nm(m=4, n=2)", (P.full() | P.causal()) & P.nm(2, 4)),
        ("per_head([causal, full]) & nm(2, 4)", P.per_head([P.causal() & P.nm(2, 4), P.nm(2, 4)])),
        ("causal & per_head([full, sink(4)])", P.causal() & P.per_head([P.full(), P.sink(4)])),
    ],
)
def test_reads_and_writes_back(text, pattern):
    got = P.parse(text)
    assert got == pattern
    assert P.parse(str(got)) == got and str(P.parse(str(got))) == str(got) == repr(got)


@pytest.mark.parametrize(
    "pattern, text",
    [
        (P.causal() & (P.window(256, 0) | P.strided(128)), "causal() & (window(256, 0) | strided(128))"),
        (P.causal() & P.full() | ~P.sink(4), "causal() & full() | ~sink(4)"),
        (~(P.causal() & P.full()), "~(causal() & full())"),
        (P.causal(align="bottom_right"), 'causal(align="bottom_right")'),
        (P.bigbird(seed=3), "bigbird(seed=3)"),
        (P.longformer(256, 2) | P.prefix(3), "longformer(256, 2) | prefix(3)"),
        (P.neighborhood((4, 6), (3, 5), 2, (True, False)), None),
        (P.neighborhood((4, 6), 3, 2, True), "neighborhood((4, 6), 3, dilation=2, causal=True)"),
        (P.neighborhood(7, 3), "neighborhood((7,), 3)"),
        (P.block_mask([[1, 0]], 4), 'block_mask(["10"], 4)'),
    ],
)
def test_writes_minimal_text(pattern, text):
    assert str(pattern) == (text or "neighborhood((4, 6), (3, 5), dilation=2, causal=(True, False))")


def test_every_name_is_public():
    assert all(getattr(P, name) is make for name, make in NAMES.items())
    constructors = {n for n in P.__all__ if n[0].islower()}
    other = {"as_pattern", "from_mask_mod", "heads_of", "load_mask", "mask", "parse", "parse_or_load"}
    assert constructors - other == set(NAMES)


@pytest.mark.parametrize(
    "text, column, message",
    [
        ("windw(3, 1)", 1, "did you mean 'window'"),
        ("causal & qqqq", 10, "the patterns are full, causal"),
        ("window(3)", 1, r"window\(left, right, align='top_left'\): missing a required argument: 'right'"),
        ("full & window", 8, "missing a required argument: 'left'"),
        ("full & strided(1, 2)", 8, "too many positional"),
        ("bigbird(windows=3)", 1, "unexpected keyword argument 'windows'"),
        ("window(left=1, left=2)", 16, "left is given twice"),
        ("window(left=1, 2)", 16, "follows one with a name"),
        ("causal &", 9, "the text ends here; expected"),
        ("", 1, "the text ends here"),
        ("causal full", 8, "unexpected 'full'; expected '&'"),
        ("full(", 6, "the text ends here"),
        ("full)", 5, r"unexpected '\)'"),
        ("causal and full", 8, "write & for 'and'"),
        ("causal or full", 8, "write | for 'or'"),
        ("not full", 1, "write ~ for 'not'"),
        ("causal && full", 9, "write a single &"),
        ("a - b", 3, "write a & ~b"),
        ("!causal", 1, "write ~ for not"),
        ("window(1.5, 2)", 9, "without a decimal point"),
        ("3", 1, "3 is not a pattern"),
        ("causal & (1, 2)", 10, r"\(1, 2\) is not a pattern"),
        ("~[causal]", 2, r"\[causal\] is not a pattern"),
        ("full | nm(2, 4)", 8, "cannot be part of |"),
        ("nm(2, 4) & nm(1, 2)", 12, "a pattern is pruned once"),
        ("nm(3, 4)", 1, r"it must be nm\(2, 4\) or nm\(1, 2\)"),
        ("window(3, -5)", 1, "left is 3 and right is -5"),
        ("full | fixed(4, 9)", 8, "summary is 9, but it must be a whole number from 1 to 4"),
        ('causal("left")', 1, "align is 'left'"),
        ("window(causal, 3)", 1, r"left is causal\(\)"),
        ('causal("left)', 8, "no closing quote"),
        ("per_head([3])", 1, "item 0 is a int"),
        ("per_head([full]) & per_head([full, full])", 20, "heads"),
        ("mask(<8 x 8, sha256 00ff>)", 6, "load_mask"),
        ("mask(3)", 1, "has no text form"),
        ("__import__('os')", 1, "unknown pattern"),
        ("full.__class__", 5, r"unexpected '\.'"),
        ("window(99999999999999999999999, 1)", 8, "too large"),
        ("window(9999999999999, 1)", 1, "too large"),
    ],
)
def test_a_mistake_is_told_with_a_caret(text, column, message):
    with pytest.raises(PatternSyntaxError, match=message) as e:
        P.parse(text)
    head, quoted, caret = str(e.value).split("\n")
    assert head.startswith(f"column {column}:") and quoted.strip() == text.strip()
    assert caret.index("^") == quoted.index(text) + column - 1 if text else caret == "  ^"


def test_long_texts_are_quoted_in_part():
    text = " | ".join(["window(3, 3)"] * 40) + " | windov(3, 3)" + " | full" * 40
    with pytest.raises(PatternSyntaxError, match="did you mean") as e:
        P.parse(text)
    _, quoted, caret = str(e.value).split("\n")
    assert len(quoted) < 100 and quoted[caret.index("^") :].startswith("windov")


@pytest.mark.parametrize("text", ["(" * 5000, "~(" * 5000 + "full", "[" * 100_000])
def test_deep_nesting_is_refused(text):
    with pytest.raises(PatternSyntaxError, match="nested brackets"):
        P.parse(text)


def test_long_flat_texts_are_fine():
    assert P.parse("~" * 20_001 + "full") == ~P.full()
    long = P.parse(" & ".join(f"strided({i})" for i in range(1, 1500)))
    assert isinstance(long, P.And) and len(long.parts) == 1499


@pytest.mark.parametrize("value", [None, 3, b"causal"])
def test_only_text_is_parsed(value):
    with pytest.raises(InvalidInput, match="expected the text"):
        P.parse(value)


def test_masks_print_readably():
    p = P.causal() & P.mask([[1, 0], [1, 1]])
    assert str(p).startswith("causal() & mask(<2 x 2, sha256 ")
    big = P.block_mask([[1] * 100] * 100, 4)
    assert str(big).startswith("block_mask(<100 x 100 blocks, sha256 ")
    for q in (p, big):
        with pytest.raises(PatternSyntaxError, match="load_mask"):
            P.parse(str(q))


# -- the reader and the grammar ----------------------------------------------------------------------------------------


def random_text(depth, rng):
    """Mostly an expression of grammar.lark; spaces, trailing commas and chains as they come."""

    def some():
        return random_text(depth - 1, rng)

    def many():
        return ", ".join(rng.choice(["", "x = ", "y="]) + some() for _ in range(rng.randrange(3)))

    leaves = ["a", "causal", "12", "-3", "1_000", "'x|'", '"y z"', "()", "[ ]", "f( )"]
    if not depth or rng.random() < 0.3:
        return rng.choice(leaves)
    return rng.choice([
        lambda: f"{some()} | {some()}", lambda: f"{some()}&{some()}", lambda: f"~{rng.choice(['', ' ~'])}{some()}",
        lambda: f"( {some()})", lambda: f"({some()}, {many()})", lambda: f"[{some()}{rng.choice(['', ','])}]",
        lambda: f"f({many()}{rng.choice(['', ','])})", lambda: f"[{many()}]",
    ])()  # fmt: skip


def plain(tree):
    """Rules, words and where they stand, of our tree or Lark's."""
    if not hasattr(tree, "children"):
        return str(tree), tree.start_pos
    kids = [plain(kid) for kid in tree.children]
    if tree.data in ("items", "arguments"):
        return str(tree.data), kids
    where = tree if isinstance(tree, Tree) else tree.meta
    return str(tree.data), where.start_pos, where.end_pos, kids


def test_the_reader_reads_what_the_grammar_says():
    from lark.exceptions import LarkError

    rng = random.Random()
    outcomes = []
    for _ in range(3000):
        text = random_text(4, rng)
        if rng.random() < 0.3:
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(["", ")", "|", "=", "?", "1", "'"]) + text[at + 1 :]
        try:
            wanted = plain(_parser().parse(text).children[0])
        except LarkError:
            wanted = None
        try:
            got = plain(read_tree(text))
        except Unreadable:
            got = None
        assert got == wanted, text
        outcomes.append(got is None)
    assert 300 < sum(outcomes) < 2700  # both kinds


def test_tokens_are_text():
    (token,) = read_tree("  causal ").children
    assert isinstance(token, Token) and token == "causal" and (token.start_pos, token.end_pos) == (2, 8)
