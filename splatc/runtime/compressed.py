"""DFSS in three kernels, for those who need the parts: scores pruned 2:4 or 1:2, their softmax, their product with V.

    probs = splatc.nm_scores(q, k).softmax()
    o = probs.spmm(v)                     # splatc.attention(q, k, v, patterns.nm(2, 4)), but for how near ties go

After Chen and others, "Dynamic N:M Fine-Grained Structured Sparse Attention Mechanism" (PPoPP 2023, arXiv 2203.00091).
On Hopper GPUs by sparse tensor cores; on CPUs the same numbers by NumPy, as a reference. Half of all scores are kept:
where only o is wanted, fused attention takes less memory and time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from splatc.errors import InvalidInput, Unsupported
from splatc.formats import nm
from splatc.patterns.pruned import TWO_OF_FOUR, Pruning
from splatc.patterns.pruned import nm as nm_pattern
from splatc.runtime.tensors import check_call, check_gradients, check_scale, dtype_name, for_autocast, is_torch

if TYPE_CHECKING:
    from splatc.runtime.compressed_gpu import CompressedKernels

DTYPES = ("float16", "bfloat16")


@dataclass(frozen=True, eq=False)
class CompressedScores:
    """The kept half of scores, or their probabilities, with metadata that says which these are.

    values: (batch, heads, q_len, 8 ceil(kv_len / 16)), float16 or bfloat16, row-major, in the order of keys; for keys
    beyond the last -inf, after a softmax 0. metadata: 32-bit words, as ``formats.nm.to_registers`` orders them;
    ``words`` has the standard order. pruning: what was kept, two of every four scores or one of every two.
    """

    values: Any
    metadata: Any
    kv_len: int
    pruning: Pruning = TWO_OF_FOUR

    @property
    def dtype(self) -> str:
        """"float16" or "bfloat16"."""
        return dtype_name(self.values)

    @property
    def nbytes(self) -> int:
        """Bytes of values and metadata."""
        return int(self.values.nbytes) + int(self.metadata.nbytes)

    @property
    def words(self) -> NDArray[np.uint16]:
        """Metadata as ``formats.nm.encode`` has it: uint16 (batch, heads, q_len, ceil(kv_len / 16))."""
        metadata = self.metadata.cpu().numpy() if is_torch(self.metadata) else self.metadata
        return nm.from_registers(metadata, self.values.shape[2], -(-self.kv_len // nm.keys_of_a_word(16)))

    def softmax(self, *, in_place: bool = False) -> CompressedScores:
        """The softmax of each row over what is kept. in_place: over these values, which are then lost."""
        if (gpu := _gpu_of(self.values)) is not None:
            return replace(self, values=gpu.softmax(self.values, in_place))
        x = _wide(self.values)
        weights = np.exp(x - x.max(-1, keepdims=True, initial=np.finfo(np.float32).min))
        p = _like(weights / weights.sum(-1, keepdims=True), self.values)
        if not in_place:
            return replace(self, values=p)
        self.values[...] = p
        return self

    def spmm(self, v: Any, *, enable_gqa: bool = False) -> Any:
        """o[i] = sum over the kept j of values[i, j] v[j]: (batch, heads, q_len, v_head_dim) in the type of v.

        v: (batch, kv_heads, kv_len, v_head_dim), of the kind, dtype and device of the values. enable_gqa: allow fewer
        heads of v. For probabilities: the -inf that scores have behind the last key would make NaN on a GPU. Raises
        InvalidInput for what does not fit, Unsupported for tensors that require gradients.
        """
        if is_torch(v):
            v, _, _ = for_autocast(v, v, v, self.dtype)
        if is_torch(v) != is_torch(self.values) or not hasattr(v, "dtype"):
            kinds = type(v).__name__, type(self.values).__name__
            raise InvalidInput(f"v is a {kinds[0]} but the values are a {kinds[1]}: give both of one kind")
        if dtype_name(v) != self.dtype or (is_torch(v) and v.device != self.values.device):
            raise InvalidInput(f"v is {_kind(v)} but the values are {_kind(self.values)}: make them alike")
        batch, heads = (int(n) for n in self.values.shape[:2])
        if v.ndim != 4 or (v.shape[0], v.shape[2]) != (batch, self.kv_len) or 0 in (v.shape[1], v.shape[3]):
            wanted = f"({batch}, heads, {self.kv_len}, v_head_dim)"
            raise InvalidInput(f"v has shape {tuple(v.shape)}: it must be {wanted}")
        if heads != v.shape[1] and (not enable_gqa or heads % v.shape[1]):
            raise InvalidInput(f"v has {v.shape[1]} heads but the values {heads}: give as many or, with "
                               "enable_gqa=True, a divisor")  # fmt: skip
        check_gradients(v)
        if (gpu := _gpu_of(v)) is not None:
            return gpu.spmm(self.values, self.metadata, v)
        return _like(_wide(self.to_dense()) @ _wide(v).repeat(heads // v.shape[1], axis=1), v)

    def to_dense(self, fill: float = 0.0) -> Any:
        """(batch, heads, q_len, kv_len), ``fill`` where nothing is kept. Made on the CPU: to look at, not for speed."""
        compressed = nm.Compressed(_wide(self.values), self.words, self.kv_len, self.pruning, 16)
        return _like(nm.decode(compressed, fill), self.values)

    def __repr__(self) -> str:
        return f"<splatc {self.pruning} scores {tuple(self.values.shape[:3])} x {self.kv_len} {self.dtype}>"


def nm_scores(q: Any, k: Any, n: int = 2, m: int = 4, *, scale: float | None = None,
              enable_gqa: bool = False) -> CompressedScores:  # fmt: skip
    """The n largest of every m consecutive scores scale * <q_i, k_j> of each query i, compressed; 2:4 or 1:2.

    q (batch, heads, q_len, dim), k (batch, kv_heads, kv_len, dim): torch tensors or NumPy arrays, float16 or bfloat16,
    on a Hopper GPU with dims that are multiples of 8. Scores are summed in float32 and selected so; of equal ones the
    lower key stays. What is kept is rounded to the type of q. Where NaN is among m, which n stay is undefined.
    scale: default 1/sqrt(dim). enable_gqa: allow fewer key heads. No gradients. Raises InvalidInput for what does not
    fit, Unsupported for what there is no kernel for.
    """
    if is_torch(q) and is_torch(k):
        q, k, _ = for_autocast(q, k, k)
    shape = check_call(q, k, k, "bhsd", enable_gqa)
    number = check_scale(scale, shape.head_dim)
    pruning = nm_pattern(n, m).pruning
    if shape.dtype not in DTYPES:
        raise Unsupported(f"compressed scores are {' or '.join(DTYPES)}, not {shape.dtype}: convert q and k")
    check_gradients(q, k)
    if (gpu := _gpu_of(q)) is not None:
        return CompressedScores(*gpu.scores(q, k, number, pruning), shape.kv_len, pruning)
    keys = _wide(k).repeat(shape.heads // shape.kv_heads, axis=1)
    scores = _wide(q) @ keys.swapaxes(-1, -2) * np.float32(number)
    compressed = nm.encode(scores, pruning)
    metadata: Any = nm.to_registers(compressed.words, pruning).view(np.int32)
    if is_torch(q):
        import torch

        metadata = torch.from_numpy(metadata)
    return CompressedScores(_like(compressed.values, q), metadata, shape.kv_len, pruning)


def _wide(x: Any) -> NDArray[np.float32]:
    """As float32, on the CPU."""
    out: NDArray[np.float32] = x.detach().float().cpu().numpy() if is_torch(x) else x.astype(np.float32)
    return out


def _like(x: NDArray[np.float32], model: Any) -> Any:
    """Of the kind and dtype of the model, and where it is."""
    if not is_torch(model):
        return x.astype(model.dtype)
    import torch

    return torch.from_numpy(np.ascontiguousarray(x)).to(model.device, model.dtype)


def _kind(x: Any) -> str:
    return f"{dtype_name(x)} on {x.device}" if is_torch(x) else dtype_name(x)


def _gpu_of(x: Any) -> CompressedKernels | None:
    """The kernels of the GPU that x lies on, None for a CPU."""
    if not is_torch(x) or x.device.type != "cuda":
        return None
    from splatc.runtime.compressed_gpu import kernels_on

    return kernels_on(x.device.index)
