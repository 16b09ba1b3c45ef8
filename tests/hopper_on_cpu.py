"""The Hopper kernel's parameters and tables in NumPy: what docs/architecture.md says that it computes of them.

For tests of everything around the kernel: tensor maps, tables, splits, merging. float16, or float32 with products in
tf32; addresses are the host's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from splatc.codegen.hopper.shape import slot_keys
from splatc.formats.nm import prune
from splatc.ir.dropout import pair_words, query_words
from splatc.ir.score import Alibi, BlockBias, RelativeBias, Score
from tests.fake_gpu import TensorMap, tf32

ROWS = 64  # of a warpgroup
MAPS = ["q_map0", "q_map1", "o_map0", "o_map1", "part_map0", *(f"{t}_map{i}" for t in "kv" for i in range(4))]
POINTERS = ["lse", "part_lse", "work", "entries", "bits", "positions", "gather", "queue"]
INTS = ["total", "blocks", "heads", "group", "q_len", "merge",
        *(f"{t}_step" for t in "qkvo"),
        *(f"o_step{view}_{axis}" for view in (0, 1) for axis in (1, 2, 3))]  # fmt: skip
ATTEND = [*(("map", name) for name in MAPS), *(("pointer", f"{name}_ptr") for name in (*POINTERS, "k", "v")),
          *(("int32", name) for name in INTS), *(("int64", f"{t}_{what}") for t in "kv" for what in ("last", "row")),
          ("float32", "scale"), ("float32", "cap")]  # fmt: skip
COMBINE = [*(("pointer", f"{name}_ptr") for name in ("o", "lse", "part_o", "part_lse", "combine", "positions")),
           *(("int64", name) for name in ("o_batch", "o_head", "o_seq")),
           *(("int32", name) for name in ("blocks", "heads", "q_len", "merge"))]  # fmt: skip


TERMS = [*(("pointer", f"{name}_ptr") for name in ("slopes", "relative", "biases", "sinks", "seed")),
         *(("int32", name) for name in ("reach", "shift", "block_size", "block_rows", "block_cols", "threshold")),
         ("float32", "kept")]  # fmt: skip
POSITIONS = [("pointer", "columns_ptr")]
STRIDES, VIEWS = 4, 4  # of a row of columns, before its lanes; rows before those of lists


def array(address: int, dtype: Any, *shape: int) -> np.ndarray:
    """The memory at an address, to read and write."""
    kind = np.dtype(dtype)
    size = int(np.prod(shape)) * kind.itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), kind).reshape(shape)


def load(maps: TensorMap, at: tuple[int, ...], dim: int) -> np.ndarray:
    """float64 (rows, dim): one box for each 128 bytes of columns."""
    chunks = [maps.load((c, *at)) for c in range(0, dim, maps.box[0])]
    return np.concatenate(chunks, axis=1).view(kind_of(maps)).astype(np.float64)[:, :dim]


def store(maps: TensorMap, at: tuple[int, ...], rows: np.ndarray) -> None:
    """float64 (64, dim) in the type of the map."""
    width, kind = maps.box[0], np.dtype(kind_of(maps))
    padded = np.zeros((len(rows), -(-rows.shape[1] // width) * width), kind)
    padded[:, : rows.shape[1]] = rows
    for c in range(0, rows.shape[1], width):
        maps.store((c, *at), np.ascontiguousarray(padded[:, c : c + width]).view(f"u{kind.itemsize}"))


def kind_of(maps: TensorMap) -> Any:
    """The NumPy type of a map's values."""
    return np.float16 if maps.dtype == "float16" else np.float32


def unpack_bits(words: np.ndarray, m: int, n: int) -> np.ndarray:
    """bool (m, n) of one tile's accumulator bits, uint32 (m / 64, 128, words)."""
    r, c = np.arange(m)[:, None], np.arange(n)[None, :]
    thread = 32 * (r % 64 // 16) + 4 * (r % 8) + c % 8 // 2
    i = 4 * (c // 8) + 2 * (r % 16 // 8) + c % 2
    return (words[r // 64 + 0 * c, thread, i // 32] >> (i % 32).astype(np.uint32) & 1).astype(bool)


def merged(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(o, lse) of several (o (rows, dim), lse (rows)) over disjoint keys."""
    top = np.max([lse for _, lse in parts], axis=0)
    safe = np.where(np.isneginf(top), 0, top)
    weights = [np.exp(lse - safe) for _, lse in parts]
    total = np.sum(weights, axis=0)
    inverse = 1 / np.where(total == 0, 1, total)
    out = sum(np.where(w[:, None] > 0, w[:, None] * o, 0) for w, (o, _) in zip(weights, parts))
    with np.errstate(divide="ignore"):
        return np.asarray(out * inverse[:, None]), np.log(total) + safe


def with_biases(score: Score, a: dict[str, Any], s: np.ndarray, head: int, q: np.ndarray,
                k: np.ndarray) -> np.ndarray:  # fmt: skip
    """Scores of queries and keys at these positions, any number where there is none."""
    distance = k[None, :] - q[:, None] - a["shift"]
    for step in score.biases:
        if isinstance(step, Alibi):
            s = s - array(a["slopes_ptr"], np.float32, a["heads"])[head] * abs(distance)
        elif isinstance(step, RelativeBias):
            table = array(a["relative_ptr"], np.float32, a["heads"], 2 * a["reach"] + 1)[head]
            s = s + table[np.clip(distance, -a["reach"], a["reach"]) + a["reach"]]
        elif isinstance(step, BlockBias):
            sides = a["block_rows"], a["block_cols"]
            table = array(a["biases_ptr"], np.float32, a["heads"], *sides)[head]
            row, col = (np.clip(x // a["block_size"], 0, side - 1) for x, side in zip((q, k), sides))
            s = s + table[np.ix_(row, col)]
    return s


def dropped(a: dict[str, Any], batch: int, head: int, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Which pairs of positions dropout drops."""
    seed = int(array(a["seed_ptr"], np.int64, 1)[0])
    words = pair_words(query_words(seed, np.int64(batch), np.int64(head), q)[:, None], k[None, :])
    return words < np.uint32(a["threshold"] % 2**32)


def attend_kernel(m: int, n: int, dim: int, score: Score = Score()) -> Callable[..., None]:  # noqa: B008 (frozen)
    """The attention, for tiles of m x n and one head dim; with the terms of a score, but for a softcap."""

    def attend(grid: tuple[int, int, int], **a: Any) -> None:
        assert grid == (a["blocks"], 1, 1) and not array(a["queue_ptr"], np.int32, 2).any()
        for row in array(a["work_ptr"], np.int32, a["total"], 12).tolist():
            row_tile(a, *row)

    def row_tile(a: dict[str, Any], batch: int, head: int, item: int, part: int, x1: int, x2: int, x3: int, first: int,
                 count: int, view: int, tiles: int, masked: int) -> None:  # fmt: skip
        assert tiles > 0

        def place(name: str, x: tuple[int, int, int], h: int) -> tuple[int, ...]:
            if name == "k" and score.pruning is not None:
                assert x[0] % 4 == x[1] == x[2] == 0
                return 0, x[0] // 4, 0, batch * a["k_step"] + h
            return x[0], x[1], x[2], batch * a[f"{name}_step"] + h

        q = load(a[f"q_map{view}"], place("q", (x1, x2, x3), head), dim) * a["scale"]
        assert len(q) == m
        pair = batch * a["heads"] + head
        positions = array(a["positions_ptr"], np.int32, item + 1, m)[item]
        scores, values, keys = [], [], []
        entries = array(a["entries_ptr"], np.int32, first + count, 8)[first:]
        for k1, k2, k3, repeat, bits, k_view, d1, d2 in entries.tolist():
            for r in range(repeat):
                at = k1 + r * d1, k2 + r * d2, k3
                k, v = (column_tile(a, name, k_view, at, place, head // a["group"]) for name in "kv")
                s = q @ k.T
                if score.positional:
                    keys.append(key_positions(a, k_view, at))
                    s = with_biases(score, a, s, head, positions, keys[-1])
                if bits:
                    shape = bits, m // ROWS, 128, -(-n // 64)
                    s = np.where(unpack_bits(array(a["bits_ptr"], np.uint32, *shape)[bits - 1], m, n), s, -np.inf)
                if score.pruning is not None:  # columns are rows of K in shared memory: to the order of keys
                    s[:, slot_keys(n)] = s.copy()
                    s = prune(s, score.pruning)
                scores.append(s)
                values.append(v)
        assert len(scores) == tiles and masked == (entries[:, 4] > 0).sum()
        s = np.concatenate(scores, axis=1)
        top = s.max(1)
        safe = np.where(np.isneginf(top), 0, top)
        p = np.exp(s - safe[:, None])
        total = p.sum(1)
        if score.dropout:
            p = np.where(dropped(a, batch, head, positions, np.concatenate(keys)), 0, p) * a["kept"]
        if a[f"q_map{view}"].dtype == "tfloat32":
            p = tf32(p).astype(np.float64)
        with np.errstate(divide="ignore"):
            o, lse = p @ np.concatenate(values) / np.where(total == 0, 1, total)[:, None], np.log(total) + safe
        there = positions >= 0
        whole = array(a["lse_ptr"], np.float32, pair + 1, a["q_len"])[pair]
        old = np.where(there, whole[positions], -np.inf) if a["merge"] and not part else None
        if score.sinks and not a["merge"] and not part:
            sink = array(a["sinks_ptr"], np.float32, a["heads"])[head]
            o, lse = merged([(o, lse), (np.zeros_like(o), np.full_like(lse, sink))])
        for w in range(m // ROWS):
            rows = slice(w * ROWS, (w + 1) * ROWS)
            if part:
                store(a["part_map0"], ((part - 1) * m + w * ROWS, 0, 0, 0), o[rows])
                continue
            o1, o2, o3 = (x + w * a[f"o_step{view}_{axis}"] for axis, x in enumerate((x1, x2, x3), 1))
            here = place("o", (o1, o2, o3), head)
            if old is not None:
                earlier = load(a[f"o_map{view}"], here, dim)
                o[rows], lse[rows] = merged([(earlier, old[rows]), (o[rows], lse[rows])])
            store(a[f"o_map{view}"], here, o[rows])
        if part:
            array(a["part_lse_ptr"], np.float32, part, m)[part - 1] = lse
        else:
            whole[positions[there]] = lse[there]

    def key_positions(a: dict[str, Any], view: int, at: Any) -> np.ndarray:
        row = view if view >= 0 else VIEWS + at[0]
        entry = array(a["columns_ptr"], np.int32, row + 1, STRIDES + n)[row]
        return entry[STRIDES:] + int(np.dot(entry[:3], at))

    def column_tile(a: dict[str, Any], name: str, view: int, at: Any, place: Any, kv_head: int) -> np.ndarray:
        if view >= 0:
            return load(a[f"{name}_map{view}"], place(name, at, kv_head), dim)
        keys = array(a["gather_ptr"], np.int32, at[0] + 1, n)[at[0]]
        rows, base = np.zeros((n, dim)), place(name, at, kv_head)[3] * a[f"{name}_last"]
        for i, key in enumerate(keys.tolist()):
            if key >= 0:
                rows[i] = array(a[f"{name}_ptr"] + 2 * (base + key * a[f"{name}_row"]), np.float16, dim)
        return rows

    return attend


def combine_kernel(m: int, dim: int, dtype: str = "float16", sinks: bool = False) -> Callable[..., None]:
    """The second function: partial results of split row tiles become rows of o and lse."""
    kind = np.dtype(dtype)

    def combine(grid: tuple[int, int, int], **a: Any) -> None:
        assert grid == (a["blocks"], 1, 1)
        for batch, head, item, first, count, *_ in array(a["combine_ptr"], np.int32, a["blocks"] * 8 // m, 8).tolist():
            positions = array(a["positions_ptr"], np.int32, item + 1, m)[item]
            there = positions >= 0
            pair = batch * a["heads"] + head
            lse = array(a["lse_ptr"], np.float32, pair + 1, a["q_len"])[pair]
            at = a["o_ptr"] + kind.itemsize * (batch * a["o_batch"] + head * a["o_head"])
            rows = [array(at + kind.itemsize * int(p) * a["o_seq"], kind, dim) for p in positions[there]]
            part_o = array(a["part_o_ptr"], kind, first + count, m, dim)[first:].astype(np.float64)
            part_lse = array(a["part_lse_ptr"], np.float32, first + count, m)[first:].astype(np.float64)
            parts = list(zip(part_o, part_lse))
            if a["merge"]:
                old = np.zeros((m, dim))
                old[there] = np.stack(rows)
                parts.append((old, np.where(there, lse[positions], -np.inf)))
            elif sinks:
                sink = array(a["sinks_ptr"], np.float32, head + 1)[head]
                parts.append((np.zeros((m, dim)), np.full(m, sink, np.float64)))
            o, out = merged(parts)
            for row, value in zip(rows, o[there]):
                row[:] = value
            lse[positions[there]] = out[there]

    return combine
