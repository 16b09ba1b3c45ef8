"""The whole compiler, in order: mask -> pattern -> ACSR -> IR -> passes -> tables and a kernel -> something to call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any

from splatc.codegen.hopper.shape import MAX_VIEWS, can_gather
from splatc.codegen.kernel import (
    FORWARD,
    KernelSpec,
    by_tensor_cores,
    gradient_spec,
    kernel_spec,
    no_gradients,
    only_two_walks,
    patch_tiles,
    tile_shapes,
    two_walks,
    with_pruning,
)
from splatc.codegen.tables import build_tables, check_nnz
from splatc.codegen.target import Target, resolve_target
from splatc.config import Config, start_logging
from splatc.errors import InvalidInput
from splatc.formats.acsr import ACSR, analyze_heads
from splatc.ir.passes import PASSES, Schedule, lower, run_passes
from splatc.ir.program import Cover, Program
from splatc.ir.score import score_of
from splatc.patterns import as_pattern
from splatc.patterns.base import Pattern
from splatc.patterns.heads import PerBatch, PerHead
from splatc.patterns.pruned import Pruned, joined, split
from splatc.runtime.attention import CompiledAttention, Plan
from splatc.runtime.dump import dump_sources, dump_tables, ir_dump
from splatc.runtime.explain import explain, least_seconds
from splatc.runtime.gpu import FindGpu
from splatc.runtime.gradient_walks import Sources
from splatc.runtime.gradients import Gradients, Planner
from splatc.runtime.gradients_gpu import GpuGradients
from splatc.runtime.kernel import Kernel, find_kernel
from splatc.runtime.tensors import LAYOUTS, Shape, check_call, check_softcap, for_autocast, is_torch, refuse_compilation
from splatc.runtime.terms import Asked, TermOptions, asked_by, check_asked
from splatc.runtime.tuned import tuned_tiles

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from splatc.runtime.gradients_portable import PortableGradients

After = Callable[[str, Program], None]


def analyze(mask: Any, seq_len: int | None = None, kv_len: int | None = None) -> ACSR:
    """The ACSR of a pattern or mask (anything that ``splatc.patterns.as_pattern`` takes).

    Lengths are needed for a symbolic pattern and taken from a matrix otherwise; kv_len defaults to seq_len.
    """
    pattern, q_len, kv_len = resolve_mask(mask, seq_len, kv_len)
    if isinstance(pattern, Pruned):
        raise InvalidInput(f"analyze takes a mask, and {pattern} depends on scores: analyze its static part, "
                           f"{pattern.static}")  # fmt: skip
    if isinstance(pattern, PerHead):
        raise InvalidInput("analyze takes the mask of one head: analyze the patterns of a per-head list one by one")
    return ACSR.from_pattern(pattern, q_len, kv_len)


def compile(mask: Any, *, seq_len: int | None = None, kv_len: int | None = None, head_dim: int, dtype: Any,
            v_head_dim: int | None = None, softcap: float | None = None, alibi: bool = False,
            relative_bias: bool = False, block_bias: bool = False, sinks: bool = False, dropout: bool = False,
            target: str | Target | None = None, layout: str = "bhsd", tile: tuple[int, int] | None = None,
            allow_tf32: bool = True, after: After | None = None) -> CompiledAttention:  # fmt: skip
    """Compile masked attention.

    mask: a pattern (also a dynamic one, with nm(2, 4)), its text, a boolean matrix, a scipy.sparse matrix, a networkx
    graph, a FlexAttention mask_mod or BlockMask, or a list with one of these for each head; ``per_batch`` patterns have
    their own for each batch entry. seq_len, kv_len: as in ``analyze``; other lengths reuse the binary. dtype:
    "float32", "float16", "bfloat16" (on a CPU also "float64") or torch's. softcap: scores s become softcap * tanh(s /
    softcap). alibi, relative_bias, block_bias, sinks, dropout: whether calls bring these (``TermOptions``; what they
    do: ir/score.py).
    target: "cpu", "cuda" or an arch such as "sm_90a" (default: the GPU here, else the CPU). layout: "bhsd" or "bshd".
    tile: (query rows, key columns) of a tile, default: the fastest for this mask by ``splatc tune`` or the cost model.
    allow_tf32: on a Hopper GPU, compute float32 by tensor cores, which round the factors of products to tf32 (11 bits;
    relative error of O < 2e-3, absolute error of LSE < 2e-3 for scores of order one); False: by the portable kernel,
    in float32 and many times slower.
    after(name, program) is called after each pass.
    """
    pattern, q_len, kv_len = resolve_mask(mask, seq_len, kv_len)
    cap = check_softcap(softcap)
    asked = check_asked(Asked(alibi, relative_bias, block_bias, sinks, dropout))
    score = score_of(cap > 0, *asked)
    spec = kernel_spec(head_dim, v_head_dim, dtype, resolve_target(target), score, tile, allow_tf32)
    again = partial(compile, pattern, seq_len=q_len, kv_len=kv_len, head_dim=head_dim, dtype=spec.dtype,
                    v_head_dim=v_head_dim, softcap=softcap, target=spec.target, layout=layout, tile=tile,
                    allow_tf32=allow_tf32, **asked._asdict())  # fmt: skip
    pattern, pruning = split(pattern)
    spec = with_pruning(spec, pruning)
    if layout not in LAYOUTS:
        raise InvalidInput(f"layout is {layout!r}: it must be one of {', '.join(LAYOUTS)}")

    start_logging(Config.from_env().log_level)
    first = best_plan(pattern, q_len, kv_len, spec, None if tile is None else (tile,), after)

    def plan(q_len: int, kv_len: int) -> Plan:
        return make_plan(pattern, q_len, kv_len, first.spec, after)

    def transposed_plan(pattern: Pattern) -> Planner:
        """Plans over the transposed mask, for one kernel of all gradients."""
        return lambda kv_len, q_len: make_plan(pattern.transposed(), kv_len, q_len, gradient_spec(first.spec), after)

    def walk_plan(pattern: Pattern, q_len: int, kv_len: int, spec: KernelSpec) -> Planner:
        """Plans for one of two walks of gradients, whose tiles are chosen for these lengths, once they are needed."""

        @cache
        def chosen() -> Plan:
            return best_plan(pattern, q_len, kv_len, spec, after=after)

        def plan(q_len: int, kv_len: int) -> Plan:
            known = chosen()
            lengths = q_len, kv_len
            return known if lengths == (known.q_len, known.kv_len) else make_plan(pattern, *lengths, known.spec, after)

        return plan

    def sources_of(pattern: Pattern) -> Sources:
        """What gradients by tensor cores are made from."""
        of_rows, *of_columns = two_walks(first.spec)
        columns = walk_plan(pattern.transposed(), kv_len, q_len, of_columns[0])
        return Sources(walk_plan(pattern, q_len, kv_len, of_rows), columns, transposed_plan(pattern),
                       gradient_spec(first.spec), tuple(of_columns))  # fmt: skip

    def portable_plan(q_len: int, kv_len: int) -> Plan:
        return make_plan(pattern, q_len, kv_len, gradient_spec(first.spec), after)

    def gradients(plan: Planner, find_gpu: FindGpu) -> Gradients | GpuGradients | PortableGradients:
        if first.spec.kernel == "cpu":
            return Gradients(found(gradient_spec(first.spec)), plan, transposed_plan(pattern), layout, cap)
        if by_tensor_cores(first.spec):
            sources = sources_of(pattern)
            if isinstance(pattern, PerBatch):
                sources = replace(sources, judged_by=sources_of(heaviest(pattern, q_len, kv_len)))
            walks = "two" if only_two_walks(first.spec) else Config.from_env().gradient_walks
            return GpuGradients(sources, found, layout, cap, walks, find_gpu)
        from splatc.runtime.gradients_portable import PortableGradients  # seldom needed

        rows = plan if first.spec.kernel == "portable" else portable_plan
        turned = transposed_plan(pattern)
        return PortableGradients(found(gradient_spec(first.spec)), rows, turned, layout, cap, find_gpu)

    made: type[CompiledAttention] = CompiledAttention
    if first.entries and not by_tensor_cores(first.spec):
        from splatc.runtime.folded import FoldedAttention  # seldom needed

        made = FoldedAttention
    return made(found(first.spec), first, plan, layout, cap, gradients, no_gradients(first.spec), again)


def found(spec: KernelSpec) -> Kernel:
    """The kernel of a spec; its sources are written to where SPLATC_DUMP asks for them."""
    kernel = find_kernel(spec)
    dump_sources(kernel)
    return kernel


def best_plan(pattern: Pattern, q_len: int, kv_len: int, spec: KernelSpec,
              tiles: tuple[tuple[int, int], ...] | None = None, after: After | None = None) -> Plan:  # fmt: skip
    """The plan of the least predicted time over tile shapes, and the kernel that it needs.

    Shapes come by the time that their tiles would take if none of it was wasted: who cannot win so is not planned.
    Where batch entries have patterns of their own, it is the shape for the heaviest of these."""
    if isinstance(pattern, PerBatch) and tiles is None:
        judge = best_plan(heaviest(pattern, q_len, kv_len), q_len, kv_len, spec).spec
        tiles = ((judge.tile_m, judge.tile_n),)
    known = tiles or (tuned_tiles(pattern, q_len, kv_len, spec) if spec.role == FORWARD else None)
    acsrs = analyze_heads(pattern, q_len, kv_len).values()
    plans: list[Plan] = []

    def consider(tiles: Iterable[tuple[int, int]]) -> None:
        sized = [replace(spec, tile_m=m, tile_n=n) for m, n in tiles]
        for least, _, one in sorted((least_seconds(acsrs, one), i, one) for i, one in enumerate(sized)):
            if all(least < plan.explanation.seconds for plan in plans):
                one = replace(one, gather=can_gather(one))
                plans.append(make_plan(pattern, q_len, kv_len, one, watched=False))

    consider(known or tile_shapes(spec))
    if not known and any(one.patched for one in plans):
        consider(patch_tiles(spec))
    best = min(plans, key=lambda plan: plan.explanation.seconds)
    if after is not None or Config.from_env().dump:  # of the one that was chosen only
        best = make_plan(pattern, q_len, kv_len, best.spec, after)
    return replace(best, spec=replace(best.spec, gather=best.explanation.gathered_tiles > 0))


def heaviest(pattern: PerBatch, q_len: int, kv_len: int) -> Pattern:
    """The pattern, of one head, with most elements."""
    analyses = analyze_heads(pattern, q_len, kv_len)
    return max(analyses, key=lambda one: analyses[one].nnz)


def make_plan(pattern: Pattern, q_len: int, kv_len: int, spec: KernelSpec, after: After | None = None,
              watched: bool = True) -> Plan:  # fmt: skip
    """Everything between a pattern and the arrays that a kernel reads; nothing is compiled. watched: dump what
    SPLATC_DUMP asks for."""
    analyses = analyze_heads(pattern, q_len, kv_len)
    distinct, acsrs = tuple(analyses), list(analyses.values())
    schedule = schedule_of(spec)
    programs = [run_passes(lower(acsr, spec.score), schedule, PASSES,
                           after or (ir_dump(one, q_len, kv_len) if watched else None))
                for one, acsr in zip(distinct, acsrs, strict=True)]  # fmt: skip
    tables = [tuple(build_tables(d, schedule.fill_empty) for _, d in p.domains if isinstance(d, Cover))
              for p in programs]  # fmt: skip
    for one, acsr, passes in zip(distinct, acsrs, tables, strict=True):
        check_nnz(passes, acsr.nnz)
        if watched:
            dump_tables(one, q_len, kv_len, passes)
    of_head = tuple(distinct.index(one) for one in pattern.heads) if isinstance(pattern, PerHead) else None
    entries = pattern.batch if isinstance(pattern, PerBatch) else 0
    pattern = joined(pattern, spec.score.pruning)
    explanation = explain(str(pattern), acsrs, programs, tables, spec)
    return Plan(pattern, q_len, kv_len, spec, tuple(programs), tuple(tables), of_head, explanation, entries)


def schedule_of(spec: KernelSpec) -> Schedule:
    """What the passes need to know of a kernel."""
    if spec.kernel != "hopper":
        return Schedule(spec.tile_m, spec.tile_n)
    rows, cols = MAX_VIEWS
    return Schedule(spec.tile_m, spec.tile_n, max_row_views=rows, max_col_views=cols, gather=spec.gather,
                    fill_empty=True)  # fmt: skip


def attention(q: Any, k: Any, v: Any, mask: Any, *, scale: float | None = None, return_lse: bool = False,
              enable_gqa: bool = False, softcap: float | None = None, layout: str = "bhsd",
              allow_tf32: bool = True, **options: Unpack[TermOptions]) -> Any:  # fmt: skip
    """Masked attention of q, k, v: ``compile`` memoised by mask and shape, and called. See CompiledAttention.

    Each length has its best tile, and a tile its kernel, compiled once for all: where lengths vary and nothing may be
    compiled again, keep a CompiledAttention, or call ``splatc.nn.functional.sparse_attention``.

    options: biases, sinks and dropout (``splatc.runtime.terms.TermOptions``); a kernel is compiled for what there is.
    """
    refuse_compilation(q, "splatc.attention", "call splatc.nn.functional.sparse_attention, or a mask compiled before")
    if layout not in LAYOUTS:
        raise InvalidInput(f"layout is {layout!r}: it must be one of {', '.join(LAYOUTS)}")
    if is_torch(q) and is_torch(k) and is_torch(v):
        q, k, v = for_autocast(q, k, v)
    shape = check_call(q, k, v, layout, enable_gqa)
    compiled = compiled_for(shape, mask, softcap, layout, allow_tf32, asked_by(options))
    return compiled(q, k, v, scale=scale, return_lse=return_lse, enable_gqa=enable_gqa, **options)


def compiled_for(s: Shape, mask: Any, softcap: float | None, layout: str, allow_tf32: bool,
                 asked: Asked, target: str | None = None) -> CompiledAttention:  # fmt: skip
    """``compile`` for a call of these sizes, memoised. target: default, that of the tensors' device."""
    target = target or ("cpu" if s.device == "cpu" else "cuda")
    sizes = *_lengths(s), s.head_dim, s.v_head_dim
    return _memo(pattern_for(s, mask), *sizes, s.dtype, softcap, target, layout, allow_tf32, asked)


def pattern_for(s: Shape, mask: Any) -> Pattern:
    """The pattern of a mask, anything that ``compile`` takes, in a call of these sizes."""
    if isinstance(mask, Pattern):
        return mask
    q_len, kv_len = _lengths(s)
    return as_pattern(mask, q_len=q_len, kv_len=kv_len, heads=s.heads, batch=s.batch)


def _lengths(s: Shape) -> tuple[int, int]:
    return max(s.q_len, 1), max(s.kv_len, 1)  # where there is nothing to attend, a mask of one does as well


@lru_cache(maxsize=256)
def _memo(pattern: Pattern, q_len: int, kv_len: int, head_dim: int, v_head_dim: int, dtype: str,
          softcap: float | None, target: str, layout: str, allow_tf32: bool,
          asked: Asked) -> CompiledAttention:  # fmt: skip
    return compile(pattern, seq_len=q_len, kv_len=kv_len, head_dim=head_dim, v_head_dim=v_head_dim, dtype=dtype,
                   softcap=softcap, target=target, layout=layout, allow_tf32=allow_tf32, **asked._asdict())  # fmt: skip


def resolve_mask(mask: Any, q_len: int | None, kv_len: int | None) -> tuple[Pattern, int, int]:
    """The pattern of a mask (anything that ``compile`` takes) and its lengths, or InvalidInput if they are unknown."""
    pattern = as_pattern(mask, q_len=q_len, kv_len=kv_len)
    own = pattern.own_lengths() or getattr(mask, "seq_lengths", None)
    if q_len is None and own is not None:
        q_len, kv_len = (int(n) for n in own)
    if q_len is None:
        raise InvalidInput(f"seq_len is missing: the pattern {pattern} has no length of its own")
    return pattern, q_len, q_len if kv_len is None else kv_len
