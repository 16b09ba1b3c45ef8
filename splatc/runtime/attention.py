"""A compiled mask: what ``splatc.compile`` returns and people call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from splatc.codegen.costs import Costs, costs_of
from splatc.codegen.hopper.shape import ITEM_BYTES, MAX_VIEWS
from splatc.codegen.kernel import KernelSpec, dtypes_of
from splatc.codegen.tables import Tables
from splatc.errors import InvalidInput, Unsupported
from splatc.ir.program import Cover, Program
from splatc.ir.terms import Terms
from splatc.patterns.base import Pattern
from splatc.runtime.cpu_call import exchange, table_arguments, term_arguments
from splatc.runtime.explain import Explanation
from splatc.runtime.gpu import FindGpu, gpu
from splatc.runtime.gradients import Gradients
from splatc.runtime.gradients_gpu import GpuGradients
from splatc.runtime.handles import new_handle
from splatc.runtime.kernel import Kernel
from splatc.runtime.launch import Launcher, remember
from splatc.runtime.plan import Launch, launches
from splatc.runtime.tensors import (
    DETACH,
    NO_TANGENTS,
    NO_TRANSFORMS,
    Shape,
    check_call,
    check_scale,
    for_autocast,
    has_tangents,
    is_torch,
    last_axis_contiguous,
    number_of,
    outputs,
    recorded,
    to_bhsd,
)
from splatc.runtime.terms import TermOptions, asked_in, check_terms, terms_of
from splatc.runtime.work import work_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from splatc.runtime.gradients_portable import PortableGradients
    from splatc.runtime.likeness import Like
    from splatc.runtime.scores import SparseScores

ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Plan:
    """A mask at fixed lengths, down to the tables of one kernel. ``programs[p]`` and ``tables[p]`` are of distinct
    pattern p; ``heads[h]`` is the pattern of head h, None if all heads share pattern 0. entries: batch entries with
    patterns of their own, whose heads follow each other in ``heads``, or one stands for all of an entry; 0: none."""

    pattern: Pattern
    q_len: int
    kv_len: int
    spec: KernelSpec
    programs: tuple[Program, ...]
    tables: tuple[tuple[Tables, ...], ...]
    heads: tuple[int, ...] | None
    explanation: Explanation
    entries: int = 0

    @property
    def patched(self) -> bool:
        """Whether all row tiles are patches of a grid."""
        covers = (d for program in self.programs for _, d in program.domains if isinstance(d, Cover))
        return all(cover.rows.kind == "patches" for cover in covers)

    def launches(self, batch: int, heads: int, max_row_views: int | None = None, max_col_views: int | None = None,
                 members: slice = ALL) -> list[Launch]:  # fmt: skip
        """The launches for these sizes, or for the heads that ``members`` picks, each with at most so many views."""
        patterns = self.patterns_of(batch, heads)[members]
        found = launches(list(self.tables), patterns, max_row_views, max_col_views)
        apart = self.entries > 0 and batch == self.entries
        return [replace(one, heads=len(patterns) // batch) for one in found] if apart else found

    def patterns_of(self, batch: int, heads: int) -> list[int]:
        """The pattern of each head; where batch entries have patterns of their own, of each head of each entry. As one
        entry these may be all heads of it. Raises InvalidInput for numbers that are not those of the pattern."""
        if self.heads is None:
            return [0] * heads
        wanted = len(self.heads) // max(self.entries, 1)
        given = batch * heads // self.entries if self.entries else heads
        if given != wanted and (wanted > 1 or not self.entries):
            raise InvalidInput(f"the pattern is for {wanted} heads but q has {given}: give one pattern a head")
        return [p for p in self.heads for _ in range(given // wanted)]

    def predict(self, batch: int, heads: int, kv_heads: int, costs: Costs | None = None) -> float:
        """Seconds of a call, its launches one after the other, but no less than moving every input and output takes.

        costs: of the kernel, default those of codegen/costs.json.
        """
        if self.spec.kernel != "hopper":
            return self.explanation.seconds * batch * (1 if self.heads else heads)
        costs, batch = costs or costs_of(self.spec), max(batch, self.entries)
        busy = sum(work_of(launch, batch, costs).microseconds for launch in self.launches(batch, heads, *MAX_VIEWS))
        dims = (self.spec.head_dim + self.spec.v_head_dim) * (self.q_len * heads + self.kv_len * kv_heads)
        moved = ITEM_BYTES[self.spec.dtype] * batch * dims
        return max(busy, costs.launch + moved / costs.bandwidth) * 1e-6


Planner = Callable[[int, int], Plan]


class CompiledAttention:
    """Masked attention for one mask, head_dim, dtype and target: ``f(q, k, v, scale=None, return_lse=False,
    enable_gqa=False)``, and what else it was compiled for (``TermOptions``).

    Lengths other than the compiled ones reuse the binary: a symbolic pattern is planned anew (milliseconds,
    remembered).
    """

    def __init__(self, kernel: Kernel, plan: Plan, replan: Planner, layout: str = "bhsd", cap: float = 0.0,
                 gradients: Callable[[Planner, FindGpu], Gradients | GpuGradients | PortableGradients] | None = None,
                 refused: str | None = None, again: Callable[[], CompiledAttention] | None = None) -> None:  # fmt: skip
        """cap: the softcap of scores, 0 for none. gradients(planner of the mask, what finds GPUs): called at the first
        backward pass. refused: why it must not be, None where there are gradients. again: compiles the same, and is
        what pickles hold."""
        self.kernel = kernel
        self.layout = layout
        self._cap = cap
        self._asked = asked_in(kernel.spec.score)
        self._asks = any(self._asked)
        self._make_gradients = None if refused else gradients
        self._refused = refused
        self._again = again
        meaning = f"{plan.pattern} {plan.q_len} {plan.kv_len} {cap}"
        self._handle = new_handle(self, f"{kernel.spec.name} {layout}", meaning)  # now: compilers cannot trace this
        self._replan = replan
        self._plan = plan
        self._plans = {(plan.q_len, plan.kv_len): plan}
        self._ready: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}  # by sizes: the tables for a CPU
        self._seen: tuple[Like, bool, Shape] | None = None  # of the last backward pass
        self._launcher = Launcher(kernel, layout, self._check, self._launches, cap)
        # (q, k, v, scale, enable_gqa, terms) -> (o, lse), without gradients
        self.run: Callable[..., tuple[Any, Any]] = (
            self._run_on_cpu if kernel.spec.target.kind == "cpu" else self._launcher
        )

    # -- what was compiled ---------------------------------------------------------------------------------------------

    @property
    def source(self) -> str:
        """The generated source: CUDA for a GPU, LLVM IR for a CPU."""
        return self.kernel.source

    @property
    def softcap(self) -> float | None:
        """The cap of scores."""
        return self._cap or None

    def explain(self) -> Explanation:
        """Density, pieces, views, tiles, waste and predicted time; print it or read its fields."""
        return self._plan.explanation

    def predict(self, batch: int = 1, heads: int = 1, kv_heads: int | None = None) -> float:
        """Seconds that a call should take by the cost model (codegen/costs.json), at the compiled lengths."""
        return self._plan.predict(batch, heads, kv_heads or heads)

    def plan(self, seq_len: int | None = None, kv_len: int | None = None) -> Plan:
        """The plan for other lengths (default: the compiled ones), remembered: calls of that length find it.

        After a call on a GPU, it is also laid out for that batch and those heads and brought to that GPU, so that a
        first call of these lengths has little left to do.
        """
        if seq_len is None:
            return self._plan
        lengths = seq_len, seq_len if kv_len is None else kv_len
        plan = self._planned(*lengths)
        self._launcher.expect(*lengths)
        return plan

    def _planned(self, q_len: int, kv_len: int) -> Plan:
        if (q_len, kv_len) not in self._plans:
            remember(self._plans, (q_len, kv_len), self._replan(q_len, kv_len))
        return self._plans[q_len, kv_len]

    def __deepcopy__(self, memory: Any) -> CompiledAttention:
        """Itself: nothing that a copy of a module could change."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """What it was compiled from: it is compiled again, or found in the cache, where it is loaded."""
        return self._again, ()

    def __repr__(self) -> str:
        p, spec = self._plan, self.kernel.spec
        return f"<splatc attention {p.pattern} {p.q_len}x{p.kv_len} d={spec.head_dim} {spec.dtype} on {spec.target}>"

    def probabilities(self, q: Any, k: Any, *, scale: float | None = None, enable_gqa: bool = False) -> SparseScores:
        """The probabilities that a call gives to the pairs of the mask, (batch, heads, nnz), by the kernels of
        ``splatc.sddmm`` and ``splatc.softmax``, differentiable, for masks alone (no ``TermOptions``)."""
        if self.kernel.spec.score:
            raise Unsupported("probabilities are computed for masks alone, and this was compiled for "
                              f"{', '.join(self.kernel.spec.score.names)}: compile the mask without")  # fmt: skip
        from splatc.runtime.unfused import sddmm, softmax

        spec = self.kernel.spec
        in_its_dtype: AbstractContextManager[Any] = nullcontext()
        if is_torch(q) and is_torch(k):
            import torch

            q, k, _ = for_autocast(q, k, k, spec.dtype)
            in_its_dtype = torch.autocast(q.device.type, enabled=False)
        shape = check_call(q, k, k, self.layout, enable_gqa)
        if (shape.dtype, shape.head_dim) != (spec.dtype, spec.head_dim):
            raise InvalidInput(f"q and k are {shape.dtype} with head_dim {shape.head_dim}: this was compiled for "
                               f"{spec.dtype} with {spec.head_dim}")  # fmt: skip
        q, k = to_bhsd(q, self.layout), to_bhsd(k, self.layout)
        with in_its_dtype:
            probs: SparseScores = softmax(sddmm(q, k, self._plan.pattern, scale=scale, enable_gqa=enable_gqa))
        return probs

    # -- calling it ----------------------------------------------------------------------------------------------------

    def __call__(self, q: Any, k: Any, v: Any, *, scale: float | None = None, return_lse: bool = False,
                 enable_gqa: bool = False, **options: Unpack[TermOptions]) -> Any:  # fmt: skip
        """Attention of q (batch, heads, q_len, head_dim), k (batch, kv_heads, kv_len, head_dim) and v (batch, kv_heads,
        kv_len, v_head_dim), torch tensors or NumPy arrays of the compiled dtype; (batch, seq, heads, dim) with
        layout="bshd".

        scale: of the scores, default 1/sqrt(head_dim). enable_gqa: allow fewer key/value heads. Returns o like q with
        v_head_dim, and with return_lse also lse (batch, heads, q_len), natural log, float32 (for float64: float64). A
        row that attends to nothing gives 0 and -inf. Under autocast, tensors are converted to the compiled dtype. Both
        are differentiable, but for biases and dropout in float32 on a GPU, and for pruning there. options:
        alibi_slopes, relative_bias, block_bias, block_size, sinks, bias_align, dropout_p and seed, where this was
        compiled for them: see ``splatc.runtime.terms.TermOptions``. Raises InvalidInput for tensors that do not fit.
        """
        terms = self._terms(q, k, options) if options or self._asks else None
        if hasattr(q, "requires_grad"):  # a torch tensor
            import torch

            compiled = torch.compiler.is_compiling()
            if compiled or torch._C._is_any_autocast_enabled():
                q, k, v = for_autocast(q, k, v, self.kernel.spec.dtype)
            if not compiled and torch._C._are_functorch_transforms_active():
                raise Unsupported(NO_TRANSFORMS)
            if not compiled and torch.autograd.forward_ad._current_level >= 0 and has_tangents(q, k, v):
                raise Unsupported(NO_TANGENTS)
            if recorded() or (torch.is_grad_enabled() and self._must_differentiate(q, k, v, terms)):
                return self._differentiable(q, k, v, scale, return_lse, enable_gqa, terms)
        o, lse = self.run(q, k, v, scale, enable_gqa, terms)
        return (o, lse) if return_lse else o

    def merge(self, o: Any, lse: Any, q: Any, k: Any, v: Any, scale: float, enable_gqa: bool) -> bool:
        """Whether attention, without gradients, has been put together with what o and lse, torch tensors, hold of the
        same queries; else nothing has happened: the kernel cannot do it for tensors like these."""
        on_gpu = self.kernel.spec.target.kind == "cuda"
        return on_gpu and self._launcher.merge(o, lse, q, k, v, scale, enable_gqa)

    def _terms(self, q: Any, k: Any, options: Any) -> Terms | None:
        spec = self.kernel.spec
        terms = terms_of(q, k, self.layout, spec.dtype, spec.score, **options)
        return terms if self._asks else None

    def backward(self, q: Any, k: Any, v: Any, o: Any, lse: Any, do: Any, dlse: Any, scale: float | None,
                 enable_gqa: bool, terms: Terms | None = None,
                 learning: Sequence[bool] | None = None) -> tuple[Any, Any, Any, list[Any]]:  # fmt: skip
        """(dq, dk, dv, those of ``terms.learning(learning)``) for the gradients do of o and dlse of lse (None for
        zeros); torch tensors, in the compiled layout."""
        shape = self._shape_of(q, k, v, enable_gqa)
        number = check_scale(scale, shape.head_dim)
        dq, dk, dv, *of_terms = self.gradients(shape, q, k, v, o, lse, do, dlse, number, terms, learning)
        return dq, dk, dv, of_terms

    def _shape_of(self, q: Any, k: Any, v: Any, enable_gqa: bool) -> Shape:
        """As ``check_call``, which looks at torch tensors like those of the call before no more."""
        known = self._seen
        if known is None or known[1] is not enable_gqa or not known[0](q, k, v):
            from splatc.runtime.likeness import likeness  # needed by backward passes only

            shape = check_call(q, k, v, self.layout, enable_gqa)
            known = self._seen = likeness(q, k, v), enable_gqa, shape
        return known[2]

    @cached_property
    def gradients(self) -> Gradients | GpuGradients | PortableGradients:
        """What computes gradients; Unsupported where nothing does."""
        return self.gradients_on(gpu)

    def launcher_on(self, find_gpu: FindGpu) -> Launcher:
        """One for the GPUs of another framework than torch."""
        return Launcher(self.kernel, self.layout, self._check, self._launches, self._cap, find_gpu)

    def gradients_on(self, find_gpu: FindGpu) -> Gradients | GpuGradients | PortableGradients:
        """The same of gradients. Raises Unsupported where nothing computes them."""
        if self._make_gradients is None:
            raise Unsupported(f"{self._refused}: {DETACH}")
        return self._make_gradients(self._planned, find_gpu)

    def _must_differentiate(self, q: Any, k: Any, v: Any, terms: Terms | None) -> bool:
        """Whether an eager call with gradients enabled has to be differentiable; Unsupported if it cannot be."""
        grad = q.requires_grad or k.requires_grad or v.requires_grad or (terms is not None and terms.requires_grad)
        if grad and self._refused:
            raise Unsupported(f"{self._refused}: {DETACH}")
        return bool(grad)

    def _differentiable(self, q: Any, k: Any, v: Any, scale: Any, return_lse: bool, enable_gqa: bool,
                        terms: Terms | None) -> Any:  # fmt: skip
        from splatc.runtime import torch_ops

        number = None if scale is None else number_of(scale)
        given = q, k, v, self._handle, number, enable_gqa, *(terms.arguments if terms is not None else ())
        o, lse = torch_ops.differentiable(*given)
        return (o, lse) if return_lse else o

    def _run_on_cpu(self, q: Any, k: Any, v: Any, scale: float | None, enable_gqa: bool,
                    terms: Terms | None) -> tuple[Any, Any]:  # fmt: skip
        shape = check_call(q, k, v, self.layout, enable_gqa)
        self._check(shape)
        if terms is not None:
            check_terms(terms, shape)
        number = check_scale(scale, shape.head_dim)
        tensors = [last_axis_contiguous(to_bhsd(x, self.layout)) for x in (q, k, v)]
        o, lse = outputs(q, shape, self.layout)
        if shape.q_len and shape.kv_len:
            self.write(shape, [exchange(x) for x in (*tensors, o, lse)], number, terms)
        else:
            o[...], lse[...] = 0, -float("inf")
            if terms is not None and terms.sinks is not None:
                lse[...] = terms.sinks[:, None]
        return to_bhsd(o, self.layout), lse

    def prepare(self, shape: Shape) -> None:
        """Plan and lay out CPU calls with these sizes, and load the kernel; raises InvalidInput if they are not for
        this mask."""
        self._check(shape)
        self._tables(shape)
        self.kernel.load()

    def write(self, shape: Shape, tensors: Sequence[Any], scale: float, terms: Terms | None) -> None:
        """Compute into the last of (q, k, v, o, lse) on a CPU: (batch, heads, seq, dim), as tvm_ffi takes them; there
        are queries and keys. terms: of NumPy arrays or torch tensors."""
        run, rest = self.kernel.load(), term_arguments(self.kernel.spec.score, terms)
        for merge, tables in enumerate(self._tables(shape)):
            run(*tensors, *tables, scale, self._cap, int(merge > 0), *rest)

    def _check(self, shape: Shape) -> None:
        spec, batch = self.kernel.spec, self._batch
        if batch and shape.batch != batch:
            raise InvalidInput(f"q has {shape.batch} batch entries, but the pattern is for {batch}")
        if shape.dtype != spec.dtype:
            dtypes = dtypes_of(spec.target)
            known = f"one of {', '.join(dtypes)}" if shape.dtype not in dtypes else "compile again for it"
            raise InvalidInput(
                f"q, k and v are {shape.dtype} but this kernel is compiled for {spec.dtype}: convert them, {known}"
            )
        if (shape.head_dim, shape.v_head_dim) != (spec.head_dim, spec.v_head_dim):
            raise InvalidInput(
                f"head_dim is {shape.head_dim} (v: {shape.v_head_dim}) but this kernel is compiled for {spec.head_dim} "
                f"(v: {spec.v_head_dim}): compile again with head_dim={shape.head_dim}, v_head_dim={shape.v_head_dim}"
            )
        kind = shape.device.partition(":")[0]
        if kind != spec.target.kind:
            raise InvalidInput(
                f"q, k, v are on {shape.device} but the kernel is for {spec.target}: move them, or compile for {kind}"
            )

    @property
    def _batch(self) -> int:
        """How many batch entries kernels get, if that is known."""
        return self._plan.entries

    def _tables(self, shape: Shape) -> list[tuple[Any, ...]]:
        """The table arguments of each pass for a CPU kernel, made once."""
        key = (shape.batch, shape.heads, shape.q_len, shape.kv_len)
        if key not in self._ready:
            launches = self._launches(shape, (None, None))
            remember(self._ready, key, [table_arguments(launch, shape.batch) for launch in launches])
        return self._ready[key]

    def _launches(self, shape: Shape, max_views: tuple[int | None, int | None]) -> list[Launch]:
        return self._planned(shape.q_len, shape.kv_len).launches(shape.batch, shape.heads, *max_views)

    @property
    def ptx(self) -> str:
        """The PTX (CUDA targets only)."""
        return self.kernel.ptx

