"""Loaders of the Long Range Arena's other tasks, on small files of the same form."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def lra(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    return importlib.import_module("lra_data")


def decoded(row):
    return bytes((row[row > 0] - 1).astype(np.uint8))


def test_text(lra, tmp_path):
    for split in ("train", "test"):
        for name in ("pos", "neg"):
            folder = tmp_path / "aclImdb" / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                (folder / f"{i}_7.txt").write_text(f"{split} {name} {i} é")
    data = lra.load("text", tmp_path, length=16)
    tokens, values = data["train"]
    assert tokens.shape == (6, 16) and values.tolist() == [0, 1] * 3
    assert decoded(tokens[3]) == "train pos 1 é".encode() and decoded(data["test"][0][4]) == "test neg 2 é".encode()
    assert decoded(lra.load("text", tmp_path, length=5, most=1)["train"][0][0]) == b"train"
    (tmp_path / "aclImdb/test/neg/0_7.txt").unlink()
    with pytest.raises(lra.DataError, match="3 reviews in pos and 2 in neg"):
        lra.load("text", tmp_path)


def test_retrieval(lra, tmp_path):
    row = '1.0\t12\t7\ta "quoted" text\tanother one\n'
    (tmp_path / "new_aan_pairs.train.tsv").write_text(row + "0\t1\t2\tx\ty\n")
    (tmp_path / "new_aan_pairs.test.tsv").write_text(row)
    tokens, values = lra.load("retrieval", tmp_path, length=32)["train"]
    assert tokens.shape == (2, 2, 32) and values.tolist() == [1, 0]
    assert [decoded(x) for x in tokens[0]] == [b'a "quoted" text', b"another one"]
    (tmp_path / "new_aan_pairs.test.tsv").write_text(row + "yes\t1\t2\tx\ty\n")
    with pytest.raises(lra.DataError, match=r"test.tsv:2: 5 fields, the first 'yes'"):
        lra.load("retrieval", tmp_path)


def test_image(lra, tmp_path):
    rng = np.random.default_rng(0)
    home = tmp_path / "cifar-10-batches-bin"
    home.mkdir()
    rows = {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        rows[name] = rng.integers(0, 256, (4, 3073)).astype(np.uint8)
        rows[name][:, 0] = rng.integers(0, 10, 4)
        (home / f"{name}.bin").write_bytes(rows[name].tobytes())
    tokens, values = lra.load("image", tmp_path)["train"]
    assert tokens.shape == (20, 1024) and values[4:8].tolist() == rows["data_batch_2"][:, 0].tolist()
    red, green, blue = rows["data_batch_1"][0, 1:].reshape(3, 1024).astype(float)
    assert np.abs(tokens[0] - 1 - (0.299 * red + 0.587 * green + 0.114 * blue)).max() <= 0.51
    (home / "test_batch.bin").write_bytes(b"short")
    with pytest.raises(lra.DataError, match="has 5 bytes"):
        lra.load("image", tmp_path)


def test_what_is_missing(lra, tmp_path):
    with pytest.raises(lra.DataError, match="none of the tasks text, retrieval, image"):
        lra.load("path", tmp_path)
    with pytest.raises(lra.DataError, match="is no folder"):
        lra.load("text", tmp_path / "away")
    for name, words in (("text", "aclImdb_v1"), ("retrieval", "new_aan_pairs.train.tsv"), ("image", "data_batch_1")):
        with pytest.raises(lra.DataError, match=words):
            lra.load(name, tmp_path)


def test_a_model_of_pairs(lra):
    torch = pytest.importorskip("torch")
    model = importlib.import_module("listops_model")
    size = model.Size(32, 1, block=8, words=lra.WORDS, classes=2, pairs=True)
    pairs = torch.randint(1, lra.WORDS, (3, 2, 32))
    net = model.Classifier(size, "sdpa").eval()
    assert net(pairs).shape == (3, 2) and torch.isfinite(net(pairs)).all()
    assert torch.allclose(net(pairs)[1], net(pairs[1:2])[0], atol=1e-5)
