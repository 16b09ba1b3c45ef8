"""Everything that can be turned into a pattern: text, arrays, sparse matrices, graphs, FlexAttention masks,
files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from splatc.errors import InvalidInput, PatternSyntaxError
from splatc.patterns.base import Pattern
from splatc.patterns.blocks import as_bool
from splatc.patterns.flex import from_block_mask, from_mask_mod
from splatc.patterns.heads import PerBatch, patterns_of, per_batch, per_head
from splatc.patterns.matrix import mask, refuse_large, sparse_from_pairs
from splatc.patterns.text import NAMES, looks_like_path, parse

__all__ = ["as_pattern", "from_mask_mod", "load_mask", "parse_or_load"]


def as_pattern(
    obj: Any, *, q_len: int | None = None, kv_len: int | None = None, heads: int | None = None,
    batch: int | None = None
) -> Pattern:
    """The pattern that `obj` stands for; True = attend throughout.

    obj: a Pattern; its text; a boolean array or tensor [q_len, kv_len], [heads, q_len, kv_len] or [batch,
    heads, q_len, kv_len]; a scipy.sparse matrix or torch sparse tensor (its stored entries that are not zero); a
    networkx graph (an edge u -> v lets u attend to v, an undirected one both ways; node i is position i if
    the nodes are 0..n-1, else positions follow list(graph); no self-loops are added); a FlexAttention
    mask_mod (needs q_len) or BlockMask; or a list of these, one for each head.
    q_len, kv_len, heads, batch: if given, the pattern is checked against them (kv_len defaults to q_len).
    """
    if kv_len is None:
        kv_len = q_len
    out = _convert(obj, q_len, kv_len, heads, batch)
    if q_len is not None and kv_len is not None:
        out.check(q_len, kv_len)
    if heads is not None:
        own = out.batch if isinstance(out, PerBatch) else 0
        patterns_of(out, heads, own if batch is None else batch)
    return out


def _convert(
    obj: Any, q_len: int | None, kv_len: int | None, heads: int | None, batch: int | None
) -> Pattern:
    home = type(obj).__module__.partition(".")[0]
    if isinstance(obj, Pattern):
        return obj
    if isinstance(obj, str):
        return parse(obj)
    if isinstance(obj, (list, tuple)):
        if any(isinstance(x, (list, tuple, bool, int)) for x in obj):
            raise InvalidInput(
                "a list is one pattern for each head: turn a list of booleans into numpy.array(...)"
            )
        return per_head([_convert(x, q_len, kv_len, None, None) for x in obj])
    if isinstance(obj, np.ndarray):
        return _from_array(obj)
    if home == "torch" and type(obj).__name__ == "BlockMask":
        lengths = tuple(int(n) for n in obj.seq_lengths)
        if q_len is not None and lengths != (q_len, kv_len):
            raise InvalidInput(
                f"the BlockMask is for lengths {lengths}, but q_len and kv_len are {q_len} and {kv_len}"
            )
        return from_block_mask(obj, heads)
    if home == "torch" and hasattr(obj, "layout"):
        return _from_tensor(obj)
    if home == "scipy" and hasattr(obj, "tocsr"):
        return _from_scipy(obj)
    if hasattr(obj, "edges") and hasattr(obj, "nodes") and hasattr(obj, "is_directed"):
        return _from_graph(obj)
    if callable(obj) and not isinstance(obj, type):
        if q_len is None or kv_len is None:
            raise InvalidInput("a mask_mod has no lengths of its own: give q_len (and kv_len)")
        return from_mask_mod(obj, q_len, kv_len, heads, batch)
    raise InvalidInput(
        f"cannot make a pattern of a {type(obj).__module__}.{type(obj).__qualname__}: give a splatc pattern,"
        " its text, a boolean array, a scipy.sparse matrix, a networkx graph, a mask_mod or a BlockMask"
    )


def _from_array(array: Any) -> Pattern:
    if array.ndim >= 2:
        refuse_large(*array.shape[-2:])
    if array.ndim == 1:
        raise InvalidInput(
            "a mask is 2-D (q_len, kv_len); for packed documents use documents(cu_seqlens=...)"
        )
    m = as_bool("mask", "array", array)
    if m.ndim < 4:
        return per_head([mask(head) for head in m]) if m.ndim == 3 else mask(m)
    same = all(np.array_equal(m[0], other) for other in m[1:])
    entries = [mask(one[0]) if len(one) == 1 else per_head([mask(head) for head in one])
               for one in m[: 1 if same else None]]  # fmt: skip
    return entries[0] if same else per_batch(entries)


def _from_tensor(tensor: Any) -> Pattern:
    if str(tensor.layout) == "torch.strided":
        return _from_array(tensor)
    if tensor.ndim != 2:
        raise InvalidInput(
            f"a sparse tensor must be 2-D, not {tensor.ndim}-D: give a list with one for each head"
        )
    coo = (
        (tensor if str(tensor.layout) == "torch.sparse_coo" else tensor.to_sparse_coo())
        .detach()
        .cpu()
        .coalesce()
    )
    row, col = coo.indices()[:, coo.values() != 0].numpy()
    return sparse_from_pairs(row, col, *tensor.shape)


def _from_scipy(matrix: Any) -> Pattern:
    if len(matrix.shape) != 2:
        raise InvalidInput(f"a sparse mask must be 2-D, not {len(matrix.shape)}-D")
    coo = matrix.tocsr().tocoo()  # through CSR, which adds up duplicate entries
    stored = coo.data != 0
    return sparse_from_pairs(coo.row[stored], coo.col[stored], *matrix.shape)


def _from_graph(graph: Any) -> Pattern:
    nodes = list(graph)
    n = len(nodes)
    numbered = all(isinstance(u, (int, np.integer)) and 0 <= u < n for u in nodes)
    place = {u: int(u) if numbered else i for i, u in enumerate(nodes)}
    pairs = np.array([(place[u], place[v]) for u, v in graph.edges()], np.int64).reshape(-1, 2)
    if not graph.is_directed():
        pairs = np.concatenate([pairs, pairs[:, ::-1]])
    return sparse_from_pairs(pairs[:, 0], pairs[:, 1], n, n)


def load_mask(path: str | Path) -> Pattern:
    """The pattern in a file; InvalidInput, in one line that names the file, if it cannot be read.

    .npy            a boolean array, as for `as_pattern`
    .npz            a scipy.sparse matrix (scipy.sparse.save_npz), or an archive of one array
    .mtx            Matrix Market; entries that are not zero attend
    .txt, .splat    the text form of a pattern; # starts a comment
    Nothing is unpickled, so .pt files are refused.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind in (".pt", ".pth", ".pkl", ".pickle"):
        raise InvalidInput(
            f"{path}: {kind} files can run code when they are loaded: save the mask by numpy.save as .npy"
        )
    if kind not in _READERS:
        raise InvalidInput(f"{path}: unknown kind of file {kind!r}: use {', '.join(_READERS)}")
    if not path.is_file():
        raise InvalidInput(f"{path}: {'is not a file' if path.exists() else 'no such file'}")
    try:
        return _READERS[kind](path)
    except PatternSyntaxError as e:
        raise PatternSyntaxError(f"{path}: {e}") from None
    except InvalidInput as e:
        raise InvalidInput(f"{path}: {e}") from None
    except ImportError:
        raise InvalidInput(f"{path}: reading {kind} files needs scipy: pip install scipy") from None
    except Exception as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        if "pickle" in reason:  # what NumPy says of an object array, and of a file that is none of its own
            reason = "it is damaged or holds Python objects, which are not loaded; save a boolean array"
        raise InvalidInput(f"{path}: not a readable {kind} file: {reason}") from e


def _read_npy(path: Path) -> Pattern:
    return _from_array(np.load(path, allow_pickle=False, mmap_mode="r"))


def _read_npz(path: Path) -> Pattern:
    with np.load(path, allow_pickle=False) as archive:
        names = archive.files
        if "format" not in names or "shape" not in names:
            if len(names) != 1:
                raise InvalidInput(
                    f"the archive must hold one array, but it holds {len(names)}: {', '.join(names)}"
                )
            return _from_array(archive[names[0]])
    from scipy import sparse

    return _from_scipy(sparse.load_npz(path))


def _read_mtx(path: Path) -> Pattern:
    from scipy.io import mmread

    m = mmread(path)
    return _from_array(m != 0) if isinstance(m, np.ndarray) else _from_scipy(m)


def _read_text(path: Path) -> Pattern:
    # A comment is blanked rather than removed, so that columns in messages keep their meaning.
    lines = path.read_text(encoding="utf-8").splitlines()
    text = " ".join(line.partition("#")[0] for line in lines).strip()
    if not text:
        raise InvalidInput("the file holds no pattern")
    return parse(text)


_READERS: dict[str, Callable[[Path], Pattern]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".mtx": _read_mtx,
    ".txt": _read_text,
    ".splat": _read_text,
}


def parse_or_load(text: str) -> Pattern:
    """A pattern from the command line: a file if `text` looks like a path or names one, otherwise pattern
    text.
    """
    if text.strip() in NAMES:
        return parse(text)
    try:
        exists = Path(text).is_file()
    except (OSError, ValueError):  # too long, or with a null byte: not a path
        exists = False
    return load_mask(text) if exists or looks_like_path(text) else parse(text)
