"""Pictures: what the images hold, exactly where they are not shrunk; files and terminal output."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from rich.console import Console

from splatc import patterns as P
from splatc.draw import Drawing, figure, print_to, save
from splatc.draw.figure import HUES, OTHERS, REMAINDER, colour_layers, colour_tiles, image_size, rgb
from splatc.draw.raster import NAMED, tile_image
from splatc.draw.terminal import mask_text
from splatc.errors import InvalidInput, Unsupported
from tests import library

NAMES = [
    "causal",
    "window",
    "dilated",
    "strided",
    "fixed",
    "bigbird",
    "sparse_transformer",
    "mask",
    "empty",
    "neighborhood_2d",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("q_len, kv_len", [(129, 129), (200, 90)])
def test_layers_are_the_mask(name, q_len, kv_len):
    pattern = library.pattern(name, q_len, kv_len)
    if pattern is None:
        pytest.skip("not at this size")
    drawing = Drawing.of(pattern, q_len, kv_len)
    layers = drawing.layers(q_len, kv_len)
    assert layers.shape == (NAMED + 2, q_len, kv_len)
    assert np.allclose(layers.sum(0), pattern.dense(q_len, kv_len))


@pytest.mark.parametrize("name", NAMES)
def test_shrunk_layers_keep_the_density(name):
    pattern = library.pattern(name, 1000)
    layers = Drawing.of(pattern, 1000).layers(100, 100)
    wanted = pattern.dense(1000).reshape(100, 10, 100, 10).mean((1, 3))
    assert layers.sum(0).mean() == pytest.approx(wanted.mean(), rel=1e-2, abs=1e-9)
    assert np.abs(layers.sum(0) - wanted).max() < 0.2


def test_a_million_rows_are_drawn_from_a_sample():
    layers = Drawing.of(P.window(1 << 17, 1 << 17), 1 << 20).layers(64, 64)
    assert layers.sum() == pytest.approx(64 * 64 * (15 / 64), rel=0.02)


@pytest.mark.parametrize("name", ["causal", "window", "fixed", "bigbird", "mask", "full", "empty"])
def test_tiles_hold_the_mask(name):
    n = 256
    drawing = Drawing.of(library.pattern(name, n), n)
    images = [tile_image(c, t, 512) for c, t in zip(drawing.covers, drawing.tables, strict=True)]
    lanes = drawing.covers[0].rows.lanes
    kept = sum((image.kept.sum() / image.cells**2) * lanes * lanes for image in images)
    assert kept == pytest.approx(drawing.acsr.nnz)
    visited = sum((image.visited.sum() / image.cells**2) for image in images)
    assert visited == pytest.approx(drawing.explanation.tiles)


def test_contiguous_tiles_look_like_the_mask():
    drawing = Drawing.of(P.causal() & P.window(100, 0), 256)
    image = tile_image(drawing.covers[0], drawing.tables[0], 256)
    assert image.cells == 64
    assert np.array_equal(image.kept > 0.5, (P.causal() & P.window(100, 0)).dense(256))


def test_tiles_of_a_long_mask_are_shrunk():
    drawing = Drawing.of(P.window(4096, 4096), 1 << 17)
    image = tile_image(drawing.covers[0], drawing.tables[0], 100)
    assert image.kept.shape == (100, 100) and image.cells == 1
    assert 0.05 < image.visited.mean() < 0.08


def test_heads():
    heads = P.per_head([P.full(), P.causal()])
    assert Drawing.of(heads, 64, head=1).acsr.nnz == 64 * 65 // 2


def test_colours():
    assert len({*HUES, OTHERS, REMAINDER}) == NAMED + 2
    layers = np.zeros((NAMED + 2, 1, 3))
    layers[1, 0, 0], layers[1, 0, 1] = 1, 0.01
    image = colour_layers(layers)
    assert np.allclose(image[0, 0], rgb(HUES[1])) and np.allclose(image[0, 2], 1)
    assert 0.6 < image[0, 1].mean() < 0.95  # a trace stays visible


def test_sizes():
    assert image_size(100, 50, 840) == (100, 50)
    assert image_size(1 << 20, 1, 840) == (840, 1)


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_files(tmp_path, kind):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"mask.{kind}"
    save(Drawing.of(P.causal() & (P.window(31, 0) | P.strided(32)), 300), path)
    head = path.read_bytes()[:8]
    assert head.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[kind])


@pytest.mark.parametrize("pieces, tiles, panels", [(True, True, 3), (True, False, 1), (False, True, 2)])
def test_panels(pieces, tiles, panels):
    pytest.importorskip("matplotlib")
    drawn = figure(Drawing.of(P.causal() & (P.window(31, 0) | P.strided(32)), 512), pieces=pieces, tiles=tiles)
    assert len(drawn.axes) == panels
    texts = " ".join(t.get_text() for t in drawn.texts)
    assert ("waste" in texts) == tiles and ("cols" in texts) == pieces


@pytest.mark.parametrize("name", NAMES)
def test_every_pattern_draws(name):
    pytest.importorskip("matplotlib")
    drawing = Drawing.of(library.pattern(name, 144), 144)
    figure(drawing)
    for cover, tables in zip(drawing.covers, drawing.tables, strict=True):
        image = colour_tiles(tile_image(cover, tables, 200))
        assert image.min() >= 0 and image.max() <= 1


def test_other_files_are_refused(tmp_path):
    with pytest.raises(InvalidInput, match="png"):
        save(Drawing.of(P.causal(), 8), tmp_path / "mask.gif")


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(Unsupported, match="pip install"):
        save(Drawing.of(P.causal(), 8), tmp_path / "mask.png")


def printed(pattern, n, encoding="utf-8", **options):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    print_to(Console(file=stream, width=100, markup=False, **options), Drawing.of(pattern, n))
    return stream.buffer.getvalue().decode(encoding)


def test_terminal_dots_are_the_mask():
    pattern = P.causal() & P.window(20, 0)
    lines = mask_text(Drawing.of(pattern, 60), 30).plain.split("\n")
    offsets = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (3, 0), (3, 1)]
    image = np.zeros((4 * len(lines), 2 * len(lines[0])), bool)
    for y, line in enumerate(lines):
        for x, character in enumerate(line):
            for bit, (dy, dx) in enumerate(offsets):
                image[4 * y + dy, 2 * x + dx] = (ord(character) - 0x2800) >> bit & 1
    assert np.array_equal(image[:60, :60], pattern.dense(60))


def test_terminal_plain_and_coloured():
    plain = printed(P.causal(), 500)
    assert "\x1b" not in plain and "density" in plain and "waste" in plain
    assert "\x1b" in printed(P.causal(), 500, force_terminal=True, color_system="truecolor")
    assert all(len(line) <= 100 for line in plain.splitlines())


def test_terminal_without_unicode():
    assert printed(P.bigbird(16), 500, encoding="ascii").isascii()


@pytest.mark.parametrize("n", [1, 2, 63, 5000])
def test_terminal_sizes(n):
    assert "┌" in printed(P.fixed(16, 2), n)
