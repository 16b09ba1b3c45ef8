"""What a kernel is specialised on: everything else arrives at run time as tensors and int32 tables."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from splatc.codegen.target import Target
from splatc.errors import InvalidInput, Unsupported
from splatc.ir.score import NO_SCORE, Score
from splatc.patterns.pruned import TWO_OF_FOUR, Pruning

DTYPES = ("float32", "float16", "bfloat16")
CPU_DTYPES = (*DTYPES, "float64")
FORWARD, BACKWARD = "forward", "backward"
ROWS, COLUMNS = "backward_rows", "backward_columns"  # a kernel each for dq, and for dk and dv
DV_ALONE, DK_ALONE = "backward_values", "backward_keys"  # a kernel each for dv and for dk
GRADIENTS = {BACKWARD: ("dq", "dk", "dv"), ROWS: ("dq",), COLUMNS: ("dk", "dv"), DV_ALONE: ("dv",), DK_ALONE: ("dk",)}
DQ_FUNCTION, DKV_FUNCTION = "splatc_gradient_dq", "splatc_gradient_dkv"  # of the portable kernel for gradients
SDDMM, SOFTMAX, SPMM = "sddmm", "softmax", "spmm"  # unfused: a kernel each, over values in ACSR order
PRODUCTS = SDDMM, SOFTMAX, SPMM
SDDMM_FUNCTION, SOFTMAX_FUNCTION, SPMM_FUNCTION = (f"splatc_{role}" for role in PRODUCTS)
SOFTMAX_BACKWARD_FUNCTION, SPMM_TRANSPOSED_FUNCTION = "splatc_softmax_backward", "splatc_spmm_transposed"
# On GPUs, of scores compressed 2:4 or 1:2: a kernel each (codegen/hopper/compressed).
COMPRESSED_SDDMM, COMPRESSED_SOFTMAX, COMPRESSED_SPMM = (f"compressed_{role}" for role in PRODUCTS)
COMPRESSED = COMPRESSED_SDDMM, COMPRESSED_SOFTMAX, COMPRESSED_SPMM
SOFTMAX_THREADS, SOFTMAX_UNIT = 256, 8  # of a block; values of 16 bytes
# (lanes, units of each), the first that has room for a row is taken; the last for any width
SOFTMAX_LANES = ((16, 1), (32, 1), (32, 2), (32, 4), (32, 8), (32, None))
TILE = (64, 64)  # of the CPU and the portable CUDA kernel: see docs/decisions/3-tiles-and-lanes.md
PATCH_TILES = (128, 112), (64, 80)
WIDEST_IN_ONE_WALK = 128  # head dim: dK, dV and dQ stay in registers
WIDEST_TOGETHER = 256  # d + dv: dK and dV of 64 keys stay in a warpgroup's registers
WIDEST_LOW = 192  # the same, of the fewer that blocks of 64 keys have, which share a multiprocessor
MOST_PADDED = 384  # d + dv, in columns of 128 bytes: two stages of 64 rows of each fit beside 128 rows of each
HOPPER_STEP = 8  # head dims that TMA can address are multiples of 16 bytes


@dataclass(frozen=True)
class KernelSpec:
    """The identity of one compiled kernel. Lengths, batch, heads and the mask are *not* part of it.

    kernel: "cpu", "portable" (CUDA, fp32 multiply-adds) or "hopper" (sm_90a: TMA and tensor cores).
    dtype: "float32", "float16" or "bfloat16" for q, k, v and o (LSE and accumulation are float32), on a CPU also
    "float64" (all in float64). The hopper kernel rounds the factors of float32 products to tf32.
    tile_m, tile_n: query rows and key columns of a tile. score: what is done to scores (ir/score.py).
    gather: some column tiles are lists of keys (hopper only). role: "forward", "backward" for the functions that
    compute gradients; on Hopper, where GRADIENTS has them, also those of some of the gradients only. PRODUCTS: one of
    the three kernels that a fused one replaces (of a softmax, head dims are 1). learning: the biases of ``score`` whose
    gradients the Hopper kernel for dq sums.
    """

    kernel: str
    head_dim: int
    v_head_dim: int
    dtype: str
    tile_m: int
    tile_n: int
    target: Target
    score: Score = NO_SCORE
    gather: bool = False
    role: str = FORWARD
    learning: Score = NO_SCORE

    @property
    def softcap(self) -> bool:
        """Whether scores are capped."""
        return self.score.softcap

    @property
    def name(self) -> str:
        """A readable name: attention_hopper_d64_bfloat16_m192n128, attention_backward_cpu_d64_float32_m64n64."""
        if self.role in PRODUCTS:
            return f"{self.role}_{self.kernel}_d{self.v_head_dim}_{self.dtype}_m{self.tile_m}n{self.tile_n}"
        what = "attention" if self.role == FORWARD else f"attention_{self.role}"
        dims = f"d{self.head_dim}" + (f"v{self.v_head_dim}" if self.v_head_dim != self.head_dim else "")
        learning = (f"d{name}" for name in self.learning.names)
        features = "".join(f"_{name}" for name in (*self.score.names, *learning, *(["gather"] if self.gather else [])))
        return f"{what}_{self.kernel}_{dims}_{self.dtype}_m{self.tile_m}n{self.tile_n}{features}"


def kernel_spec(head_dim: int, v_head_dim: int | None, dtype: Any, target: Target, score: Score = NO_SCORE,
                tile: tuple[int, int] | None = None, allow_tf32: bool = True) -> KernelSpec:  # fmt: skip
    """The spec that a user's options name; dtype may be torch's, tile defaults to a good one. Raises InvalidInput.

    allow_tf32: whether float32 may be computed by tensor cores.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in dtypes_of(target):
        raise InvalidInput(f"dtype is {dtype}: it must be one of {', '.join(dtypes_of(target))}")
    for what, value in (("head_dim", head_dim), ("v_head_dim", v_head_dim)):
        if value is not None and (not isinstance(value, int) or not 1 <= value <= 256):
            raise InvalidInput(f"{what} is {value!r}: it must be a whole number from 1 to 256")
    v_head_dim = v_head_dim or head_dim
    portable = not_hopper(head_dim, v_head_dim, name, target, allow_tf32) is not None
    kernel = "cpu" if target.kind == "cpu" else "portable" if portable else "hopper"
    if tile is not None and tile not in all_tiles(kernel, name):
        known = ", ".join(f"({m}, {n})" for m, n in all_tiles(kernel, name))
        raise InvalidInput(f"tile is {tile!r}: for these options it can be {known}, or None")
    spec = KernelSpec(kernel, head_dim, v_head_dim, name, *TILE, target, score)
    tile_m, tile_n = tile or tile_shapes(spec)[0]
    return replace(spec, tile_m=tile_m, tile_n=tile_n)


def with_pruning(spec: KernelSpec, pruning: Pruning | None) -> KernelSpec:
    """The spec of a kernel that prunes scores, too (None: the same); Unsupported where there is no such kernel."""
    if pruning is None:
        return spec
    if (why := not_pruned(spec)) is not None:
        raise Unsupported(f"{pruning} has no kernel for {spec.target} here: {why}; compile for the CPU, or let "
                          "splatc.nn.functional.dense_attention compute it densely, on any device")  # fmt: skip
    return replace(spec, score=replace(spec.score, pruning=pruning))


def not_pruned(spec: KernelSpec) -> str | None:
    """Why no kernel of this kind prunes scores, None if one does."""
    if spec.kernel == "cpu":
        return None
    if spec.kernel != "hopper" or spec.dtype == "float32":
        return "it needs the Hopper kernel (sm_90a, head dims that are multiples of 8, 16-bit types)"
    return "with pruning there are no biases and no dropout" if spec.score.positional else None


def product_spec(role: str, dim: int, dtype: str, target: Target) -> KernelSpec:
    """The spec of one of PRODUCTS for a head dim (a softmax has none: 1). Raises InvalidInput, Unsupported."""
    spec = replace(kernel_spec(dim, dim, dtype, target), role=role, tile_m=TILE[0], tile_n=TILE[1])
    if target.kind == "cpu":
        return spec
    instead = "use splatc.attention, which is fused, or move the tensors to the CPU"
    if target.arch != "sm_90a":
        raise Unsupported(f"sddmm, softmax and spmm are there for CPUs and for sm_90a, not for {target}: {instead}")
    if role != SOFTMAX and dim % HOPPER_STEP:
        raise Unsupported(f"on a GPU the head dims of sddmm and spmm are multiples of {HOPPER_STEP}, not {dim}: pad "
                          f"with zeros, {instead}")  # fmt: skip
    return replace(spec, kernel="hopper")


def compressed_spec(role: str, dim: int, dtype: str, target: Target, rows: int = 256,
                    pruning: Pruning = TWO_OF_FOUR) -> KernelSpec:  # fmt: skip
    """The spec of one of COMPRESSED for a head dim (a softmax has none: 8); rows: of a tile; pruning: how the sddmm
    selects, all that differs. Raises InvalidInput for what is no such type or size, Unsupported for what there is no
    kernel for."""
    spec = replace(kernel_spec(dim, dim, dtype, target), role=role)
    if (why := not_pruned(spec)) is not None:
        raise Unsupported(f"there is no kernel for compressed scores of {dtype} with head dim {dim} on {target}: {why}")
    score = Score(pruning=pruning) if role == COMPRESSED_SDDMM else NO_SCORE
    return replace(spec, tile_m=rows if dim <= 64 else 128, tile_n=128, score=score)


def dtypes_of(target: Target) -> tuple[str, ...]:
    """The types of q, k and v that kernels for a target take."""
    return CPU_DTYPES if target.kind == "cpu" else DTYPES


def not_hopper(head_dim: int, v_head_dim: int, dtype: str, target: Target, allow_tf32: bool = True) -> str | None:
    """Why the Hopper kernel does not serve a request on a GPU, None if it does."""
    if target.arch != "sm_90a":
        return f"the target must be sm_90a, not {target.arch}"
    if head_dim % HOPPER_STEP or v_head_dim % HOPPER_STEP:
        return f"head dims must be multiples of {HOPPER_STEP}, not {head_dim} (v: {v_head_dim})"
    if dtype == "float32" and not allow_tf32:
        return "float32 must be allowed to be rounded to tf32: allow_tf32 is False"
    return None


def no_gradients(spec: KernelSpec) -> str | None:
    """Why there is no kernel for the gradients of a kernel, None if there is one."""
    if spec.kernel == "hopper" and spec.score.pruning is not None:
        return f"on a GPU there are none of {spec.score.pruning}"
    others = [name for name in spec.score.names if name not in ("softcap", "sinks")]
    if spec.kernel == "hopper" and spec.dtype == "float32" and others:
        return f"on a GPU gradients in float32 are computed by the portable kernel, which has no {', '.join(others)}"
    return None


def by_tensor_cores(spec: KernelSpec) -> bool:
    """Whether the gradients of a kernel are: those of tf32 are left to the portable kernel."""
    return spec.kernel == "hopper" and spec.dtype != "float32"


def gradient_spec(spec: KernelSpec) -> KernelSpec:
    """The spec of the kernel for all gradients of a kernel; Unsupported if there are none.

    Where gradients take two walks in any case it names no kernel, but what those over columns share: their tiles.
    """
    if (why := no_gradients(spec)) is not None:
        raise Unsupported(why)
    if spec.kernel == "cpu":
        return replace(spec, role=BACKWARD)
    score = replace(spec.score, sinks=False)  # LSE has them
    if not by_tensor_cores(spec):
        tile_m, tile_n = TILE
        return replace(spec, kernel="portable", role=BACKWARD, score=score, tile_m=tile_m, tile_n=tile_n, gather=False)
    many = max(spec.head_dim, spec.v_head_dim) <= 64 and not score  # registers for twice the queries
    gradient = replace(spec, role=BACKWARD, score=score, tile_m=128, gather=False)
    return replace(gradient, tile_n=32 if _smallest_tiles(gradient) else 128 if many else 64)


def two_walks(spec: KernelSpec) -> tuple[KernelSpec, ...]:
    """The specs of the kernels for the gradients of a Hopper kernel in two walks: over rows; one or two over columns.

    Of the tiles that they may have (``tile_shapes``), the most usual ones.
    """
    gradient = gradient_spec(spec)
    rows = replace(gradient, role=ROWS)
    tile_m, tile_n = tile_shapes(rows)[0]
    together = _padded(spec, 16) <= WIDEST_TOGETHER
    roles = (COLUMNS,) if together else (DV_ALONE, DK_ALONE)
    return replace(rows, tile_m=tile_m, tile_n=tile_n), *(replace(gradient, role=role) for role in roles)


def gradient_specs(spec: KernelSpec) -> tuple[KernelSpec, ...]:
    """All kernels that the gradients of a kernel may be computed by."""
    one = () if only_two_walks(spec) else (gradient_spec(spec),)
    return (*one, *(two_walks(spec) if by_tensor_cores(spec) else ()))


def only_two_walks(spec: KernelSpec) -> bool:
    """Whether gradients take two walks whatever they cost: dQ in sums leaves no registers for biases and dropout, nor
    for wide heads."""
    widest = max(spec.head_dim, spec.v_head_dim)
    return by_tensor_cores(spec) and (spec.score.positional or widest > WIDEST_IN_ONE_WALK)


def tile_shapes(spec: KernelSpec) -> tuple[tuple[int, int], ...]:
    """The (tile_m, tile_n) worth considering, the most usual first (measured: docs/performance.md)."""
    widest = max(spec.head_dim, spec.v_head_dim)
    low = ((64, 64),) if _padded(spec, 16) <= WIDEST_LOW and not spec.score else ()  # of gradients
    if spec.role in (BACKWARD, COLUMNS, DV_ALONE, DK_ALONE):
        return ((spec.tile_m, spec.tile_n), *(low if spec.role == COLUMNS else ()))
    if spec.kernel != "hopper":
        return (TILE,)
    if spec.role == ROWS:  # with a softcap, wide tiles of wide heads take too many registers
        narrow = spec.score.positional or (spec.softcap and widest > 64)
        if _smallest_tiles(spec):
            return ((128, 32),)
        if narrow or widest > WIDEST_IN_ONE_WALK:
            return ((128, 64),)
        return ((128, 128), (128, 64), *low)
    if _crowded(spec):
        return ((128, 32 if widest > 128 or (spec.dtype == "float32" and widest > 64) else 64),)
    if spec.dtype == "float32":
        return ((128, 128),) if widest <= 64 else ((128, 64),) if widest <= 192 else ((128, 32),)
    if widest > 128:
        return ((128, 64),)
    others = replace(spec.score, pruning=None)  # with any, 192 rows take too many registers
    tall = ((192, 128),) if widest <= 64 and not others else ()
    return (*tall, (128, 128), (128, 64), (64, 64))


def patch_tiles(spec: KernelSpec) -> tuple[tuple[int, int], ...]:
    """What else is worth considering for neighbourhoods, where they fit: keys by 28 x 4 around 16 x 8 queries, or by
    20 x 4 around 8 x 8, which gradients have not; those over columns have neither, nor has pruning, which goes by 64
    keys."""
    wide, pruned = max(spec.head_dim, spec.v_head_dim) > 128, spec.score.pruning is not None
    if spec.role not in (FORWARD, ROWS) or wide or pruned or _crowded(spec):
        return ()
    known = all_tiles(spec.kernel, spec.dtype)
    rows = {m for m, _ in tile_shapes(spec)} if spec.role == FORWARD else {128}
    return tuple(tile for tile in PATCH_TILES if tile in known and tile[0] in rows)


def _crowded(spec: KernelSpec) -> bool:
    """Whether expressions on scores leave registers for small tiles only."""
    roomy = max(spec.head_dim, spec.v_head_dim) <= 192
    few = spec.score.names == ("alibi",) or (spec.score.names == ("dropout",) and roomy)
    return spec.score.positional and not (few and spec.role == FORWARD)


def _smallest_tiles(spec: KernelSpec) -> bool:
    """Whether there is room for the smallest tiles only, in gradients: expressions on scores and accumulators of wide
    heads share registers; K and V of 128 keys (Q and dO of 128 queries) share memory with two stages of the others."""
    widest, score = max(spec.head_dim, spec.v_head_dim), spec.score
    if _padded(spec, 64) > MOST_PADDED or (widest > 192 and score):
        return True
    return score.positional and len(score.names) > (0 if widest > 128 else 1 if widest > 64 else 2)


def _padded(spec: KernelSpec, step: int) -> int:
    """Both head dims, each rounded up to a multiple of ``step``."""
    return sum(-(-dim // step) * step for dim in (spec.head_dim, spec.v_head_dim))


def all_tiles(kernel: str, dtype: str) -> tuple[tuple[int, int], ...]:
    """Every tile that a kernel can be asked for; what does not fit head dims is refused when the kernel is emitted."""
    if kernel != "hopper":
        return (TILE,)
    return TF32_TILES if dtype == "float32" else HOPPER_TILES


HOPPER_TILES = (*((m, n) for m in (64, 128, 192) for n in (64, 128)), (128, 32), *PATCH_TILES)
TF32_TILES = tuple((m, n) for m in (64, 128, 192) for n in (32, 64, 128))
