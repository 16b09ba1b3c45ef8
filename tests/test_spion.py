"""Patterns found in maps of attention: equal to the published rules, taken literally; odd sizes, heads, bad input."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import splatc
from splatc import oracle
from splatc import patterns as P
from splatc.errors import InvalidInput
from splatc.sparsify import find_pattern
from splatc.sparsify.pooling import diagonal_sums, pool, pool_on_cpu
from splatc.sparsify.spion import VARIANTS, fill_paths, largest
from tests import spion_rules

KINDS = ("bands", "verticals", "blobs", "noise")


def a_map(kind: str, length: int, rng: np.random.Generator) -> np.ndarray:
    """A map of one kind; half of them on a ground of exact zeros, with values that tie exactly."""
    i, j = np.ogrid[:length, :length]
    out = np.zeros((length, length))
    for _ in range(int(rng.integers(1, 4))):
        if kind == "bands":
            out += abs(j - i - rng.integers(-length // 2, length // 2)) <= rng.integers(0, 1 + length // 8)
        elif kind == "verticals":
            out += (abs(j - rng.integers(0, length)) <= rng.integers(0, 1 + length // 16)) + 0.0 * i
        elif kind == "blobs":
            y, x, r = rng.integers(0, length), rng.integers(0, length), 1 + rng.integers(0, length // 4)
            out += (i - y) ** 2 + (j - x) ** 2 <= r**2
        else:
            out += rng.random((length, length)) ** 8
    return out * 0.25 if rng.random() < 0.5 else out + rng.random((length, length)) * rng.choice([0.01, 0.3])


@pytest.mark.parametrize("number", range(200))
def test_the_published_rules(number):
    rng = np.random.default_rng(number)
    length, block = int(rng.choice([8, 24, 31, 40, 48])), int(rng.choice([2, 4, 5]))
    quantile, width = float(rng.choice([0.5, 0.8, 0.9, 0.96, 0.98])), int(rng.choice([1, 3, 9, 31]))
    scores = a_map(KINDS[number % 4], length, rng)
    for variant in VARIANTS:
        found = find_pattern(scores, block, quantile, width, variant)
        wanted = spion_rules.blocks(scores, block, quantile, width, variant)
        assert (found.maps[0].blocks == wanted).all(), variant
        assert (found.pattern.dense(length) == np.kron(wanted, np.ones((block, block), bool))[:length, :length]).all()


@pytest.mark.parametrize("length, block, width", [(1, 4, 3), (17, 17, 5), (10, 64, 31), (127, 16, 31), (129, 64, 31),
                                                  (64, 4, 31), (50, 7, 1), (33, 1, 9)])  # fmt: skip
def test_pooling_in_one_reading(length, block, width):
    scores = np.random.default_rng(length).random((length, length))
    sums = diagonal_sums(scores, width)
    assert np.allclose(sums, spion_rules.filtered(scores, width), rtol=1e-13)
    wanted = spion_rules.pooled(sums.tolist(), block)
    assert np.allclose(pool_on_cpu(scores, block, width), wanted, rtol=1e-13)
    torch = pytest.importorskip("torch")
    from splatc.sparsify.pooling import _pool_on_device

    assert np.allclose(_pool_on_device(torch.from_numpy(scores), block, width), wanted, rtol=1e-13)
    single = scores.astype(np.float32)
    assert np.allclose(pool_on_cpu(single, block, width), pool_on_cpu(single.astype(np.float64), block, width))


def test_zeros_stay_zeros():
    scores = np.zeros((96, 96))
    scores[10:20, 40:50] = 1 / 3
    for block in (5, 16, 64):
        wanted = spion_rules.pooled(diagonal_sums(scores, 31).tolist(), block)
        assert ((pool(scores, block, 31) == 0) == (wanted == 0)).all()


def test_a_path_goes_where_values_are_largest():
    pooled = np.zeros((4, 4))
    pooled[1, 0] = pooled[2, 1] = pooled[2, 2] = pooled[2, 3] = 1.0
    paths = fill_paths(pooled)
    assert paths[1, 0] and paths[2, 1] and paths[2, 2] and paths[2, 3]
    assert not paths[0].any()  # where a path starts is no step
    assert fill_paths(np.zeros((3, 3))).tolist() == [[False] * 3, [False, True, True], [False, True, True]]


def test_maps_for_looking_at():
    scores = a_map("bands", 96, np.random.default_rng(1))
    found = find_pattern(scores, 16, 0.9)
    (maps,) = found.maps
    assert maps.scores is scores and maps.filtered.shape == (96, 96) and maps.pooled.shape == (6, 6)
    assert np.allclose(maps.filtered.reshape(6, 16, 6, 16).mean((1, 3)), maps.pooled)
    assert maps.threshold == np.quantile(maps.pooled, 0.9) and maps.paths is not None
    assert (maps.blocks == (maps.paths & (maps.pooled > maps.threshold) | np.eye(6, dtype=bool))).all()
    assert maps.density == maps.blocks.mean() and found.pattern == maps.pattern
    only = find_pattern(scores, 16, 0.9, variant="T").maps[0]
    assert only.paths is None and only.filter == 1 and (only.filtered == scores).all()
    most = find_pattern(scores, 16, variant="C", density=0.5).maps[0]
    assert most.threshold is None and (most.blocks == largest(most.pooled, 12) | np.eye(6, dtype=bool)).all()


def test_heads():
    rng = np.random.default_rng(2)
    scores = np.stack([a_map(kind, 64, rng) for kind in KINDS])
    together = find_pattern(scores, 8, 0.9)
    assert together.pattern == find_pattern(scores.mean(0), 8, 0.9).pattern and len(together.maps) == 1
    each = find_pattern(scores, 8, 0.9, per_head=True)
    assert isinstance(each.pattern, P.PerHead) and len(each.maps) == 4
    for head, scores_of_head in zip(each.pattern.heads, scores):
        assert head == find_pattern(scores_of_head, 8, 0.9).pattern


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_torch_maps(dtype):
    torch = pytest.importorskip("torch")
    scores = torch.from_numpy(a_map("blobs", 80, np.random.default_rng(3))).to(getattr(torch, dtype)).requires_grad_()
    found, wanted = find_pattern(scores, 16, 0.9), find_pattern(scores.detach().double().numpy(), 16, 0.9)
    assert found.pattern == wanted.pattern and np.allclose(found.maps[0].filtered, wanted.maps[0].filtered)


@pytest.mark.gpu
def test_maps_on_a_gpu():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    for number, kind in enumerate(KINDS):
        scores = a_map(kind, 257, np.random.default_rng(number))
        for variant in VARIANTS:
            found = find_pattern(torch.from_numpy(scores).cuda(), 16, 0.9, variant=variant)
            assert found.pattern == find_pattern(scores, 16, 0.9, variant=variant).pattern


def test_the_pattern_compiles():
    rng = np.random.default_rng(4)
    scores = a_map("verticals", 200, rng)
    q, k, v = (rng.standard_normal((1, 2, 200, 16), np.float32) for _ in "qkv")
    for pattern in (find_pattern(scores, 64, 0.8).pattern, find_pattern(scores, 64, 0.8).pattern & P.causal()):
        o = splatc.attention(q, k, v, pattern)
        assert oracle.relative_error(o, oracle.attention(q, k, v, pattern.dense(200))[0]) < 1e-5


@pytest.mark.parametrize("scores, options, words", [
    (np.ones((4, 5)), {}, "must be .length, length."),
    (np.ones((0, 0)), {}, "must be .length, length."),
    ([[1.0]], {}, "have shape"),
    (np.ones((4, 4)), {"per_head": True}, "map of each head"),
    (np.full((4, 4), np.nan), {"block": 2}, "not all finite"),
    (np.ones((4, 4)), {"block": 0}, "block is 0"),
    (np.ones((4, 4)), {"filter": 4}, "must be odd"),
    (np.ones((4, 4)), {"quantile": 1.5}, "quantile is 1.5"),
    (np.ones((4, 4)), {"variant": "X"}, "'X': it must be one of CF: diagonal"),
    (np.ones((4, 4)), {"density": 0.5}, "only variant C"),
    (np.ones((4, 4)), {"variant": "C", "density": 0.0}, "above 0"),
])  # fmt: skip
def test_bad_input(scores, options, words):
    with pytest.raises(InvalidInput, match=words):
        find_pattern(scores, **options)


def test_finding_needs_no_torch():
    script = "import sys; from splatc.sparsify import find_pattern; assert not {'torch', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_pictures_of_maps(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from splatc.cli.main import run
    from splatc.draw.maps import maps_figure, shrink

    scores = a_map("bands", 300, np.random.default_rng(6))
    np.save(tmp_path / "scores.npy", scores)
    np.save(tmp_path / "heads.npy", np.stack([scores, scores.T]).astype(np.float32))
    for name in ("scores.npy", "heads.npy"):
        picture = tmp_path / f"{name}.png"
        options = ["--maps", "--block", "16", "--quantile", "0.9", "-o", str(picture)]
        assert run(["show", str(tmp_path / name), *options]) == 0
        assert picture.stat().st_size > 10_000 and "of 19^2 blocks" in capsys.readouterr().err
    titles = {"CF": ["scores", "sums", "means", "fill", "pattern"], "F": ["scores", "means", "fill", "pattern"],
              "C": ["scores", "sums", "means", "pattern"], "T": ["scores", "means", "pattern"]}  # fmt: skip
    for variant, wanted in titles.items():
        (maps,) = find_pattern(scores, 16, 0.9, variant=variant).maps
        axes = maps_figure(maps).axes
        assert [one.get_title(loc="left").split()[0].rstrip(",:") for one in axes] == wanted
        assert (np.asarray(axes[-1].images[0].get_array()) == maps.blocks).all()
    assert np.allclose(shrink(np.ones((1700, 1700))), 1)
    assert shrink(np.eye(1700)).sum() * 3 == pytest.approx(567, rel=1e-2)  # means of 3 x 3 cells


@pytest.mark.parametrize("arguments, words", [
    (["scores.npy"], "give -o maps.png"),
    (["missing.npy", "-o", "maps.png"], "No such file"),
    (["text.npy", "-o", "maps.png"], "no .npy file of numbers"),
    (["whole.npy", "-o", "maps.png"], "holds no floats"),
    (["scores.npy", "-o", "maps.gif"], "cannot draw a .gif file"),
])  # fmt: skip
def test_wrong_maps(arguments, words, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    from splatc.cli.main import run

    monkeypatch.chdir(tmp_path)
    np.save("scores.npy", np.ones((8, 8)))
    np.save("whole.npy", np.ones((8, 8), int))
    (tmp_path / "text.npy").write_text("not an array")
    assert run(["show", *arguments, "--maps"]) != 0
    assert words in capsys.readouterr().err
