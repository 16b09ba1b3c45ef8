"""Tasks of the Long Range Arena (arXiv:2011.04006) as tokens, from files that you have; nothing is downloaded.

    text       IMDb reviews, byte by byte: aclImdb/{train,test}/{pos,neg}/*.txt
    retrieval  whether two papers cite each other: lra_release/lra_release/tsv_data/new_aan_pairs.{train,test}.tsv,
               rows of label, two numbers and two texts
    image      CIFAR-10 in grey, pixel by pixel: cifar-10-batches-bin/{data_batch_1 ... 5,test_batch}.bin (the "binary
               version")

The files may lie in the folder that is named or in one below it. A token is 1 + its byte; 0 is padding.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WORDS = 257
PIXELS = 1024
LUMA = np.array([299, 587, 114])  # red, green, blue, of 1000

Examples = tuple[np.ndarray, np.ndarray]  # tokens uint16 (count, [2,] length), values uint8 (count,)


@dataclass(frozen=True)
class Task:
    """length: of a sequence, a multiple of SPION's blocks; pairs: whether an example is two of them."""

    read: Callable[[Path, str], Iterator[tuple[int, list[bytes]]]]
    length: int
    classes: int
    pairs: bool = False


class DataError(Exception):
    """Files that are not there, or not what they should be."""


def load(name: str, folder: Path, length: int | None = None, most: int | None = None) -> dict[str, Examples]:
    """{"train": (tokens, values), "test": ...} of a task of ``TASKS``; longer texts are cut. length: default the
    task's. most: examples of each to read, in the order of the files. Raises DataError."""
    if name not in TASKS:
        raise DataError(f"{name!r} is none of the tasks {', '.join(TASKS)}")
    task = TASKS[name]
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: give the one that has the files of {name}; see {Path(__file__).name}")
    return {split: _tokens(task, task.read(folder, split), length or task.length, most) for split in ("train", "test")}


def _tokens(task: Task, rows: Iterator[tuple[int, list[bytes]]], length: int, most: int | None) -> Examples:
    tokens, values = [], []
    for value, texts in rows:
        if len(values) == most:
            break
        row = np.zeros((len(texts), length), np.uint16)
        for i, text in enumerate(texts):
            part = np.frombuffer(text[:length], np.uint8)
            row[i, : len(part)] = part + np.uint16(1)
        tokens.append(row if task.pairs else row[0])
        values.append(value)
    return np.stack(tokens), np.array(values, np.uint8)


def _find(folder: Path, place: str, what: str) -> Path:
    """The file or folder ``place`` in the folder or one below it."""
    found = [folder / place, *sorted(folder.rglob(place))]
    for path in found:
        if path.exists():
            return path
    raise DataError(f"{folder} has no {place}: {what}")


def read_text(folder: Path, split: str) -> Iterator[tuple[int, list[bytes]]]:
    """Reviews, bad ones (0) and good ones (1) in turn."""
    home = _find(folder, f"{split}/pos", 'unpack aclImdb_v1.tar.gz ("Large Movie Review Dataset") there').parent
    good, bad = (sorted((home / name).glob("*.txt")) for name in ("pos", "neg"))
    if not good or len(good) != len(bad):
        raise DataError(f"{home} has {len(good)} reviews in pos and {len(bad)} in neg: as many are expected, *.txt")
    for pair in zip(bad, good, strict=True):
        yield from ((value, [path.read_bytes()]) for value, path in enumerate(pair))


def read_retrieval(folder: Path, split: str) -> Iterator[tuple[int, list[bytes]]]:
    """Pairs of papers: 1 if one cites the other."""
    path = _find(folder, f"new_aan_pairs.{split}.tsv", "unpack the Long Range Arena's lra_release.gz there")
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), 1):
            if len(row) != 5 or row[0] not in ("0", "1", "0.0", "1.0"):
                raise DataError(f"{path}:{number}: {len(row)} fields, the first {row[0][:20]!r}: label (0 or 1), two "
                                "numbers and two texts are expected, with tabs between")  # fmt: skip
            yield int(float(row[0])), [text.encode() for text in row[3:]]


def read_image(folder: Path, split: str) -> Iterator[tuple[int, list[bytes]]]:
    """Pictures row by row, in grey."""
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    for name in names:
        path = _find(folder, name, "unpack cifar-10-binary.tar.gz there (the Python version is pickled: not read)")
        raw = np.frombuffer(path.read_bytes(), np.uint8)
        if len(raw) == 0 or len(raw) % (1 + 3 * PIXELS):
            raise DataError(f"{path} has {len(raw)} bytes: a multiple of {1 + 3 * PIXELS} is expected, a label and "
                            "three colours of 32 x 32")  # fmt: skip
        rows = raw.reshape(-1, 1 + 3 * PIXELS)
        if rows[:, 0].max() > 9:
            raise DataError(f"{path}: a label is {rows[:, 0].max()}: 0 to 9 are expected")
        grey = ((LUMA[:, None] * rows[:, 1:].reshape(-1, 3, PIXELS)).sum(1) + 500) // 1000
        for value, picture in zip(rows[:, 0].tolist(), grey.astype(np.uint8), strict=True):
            yield value, [picture.tobytes()]


TASKS = {
    "text": Task(read_text, 4096, 2),
    "retrieval": Task(read_retrieval, 4096, 2, pairs=True),
    "image": Task(read_image, PIXELS, 10),
}
