"""Gradients on Hopper without a GPU: NumPy twins of the kernels read what the launches of either way prepare."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splatc import oracle
from splatc import patterns as P
from splatc.codegen.build import emit, source_of
from splatc.codegen.costs import Costs
from splatc.codegen.emitted import parse_signatures
from splatc.codegen.hopper.backward.shape import DISTANCE_BITS
from splatc.codegen.kernel import KernelSpec, gradient_spec, kernel_spec, two_walks
from splatc.codegen.target import Target
from splatc.compile import best_plan, make_plan
from splatc.config import GRADIENT_WALKS
from splatc.ir.score import score_of
from splatc.ir.terms import Terms
from splatc.patterns.heads import patterns_of
from splatc.runtime import gradients_gpu
from splatc.runtime.bias_gradients import BiasGradients
from splatc.runtime.gradient_walks import Sources, way_of
from splatc.runtime.gradients_gpu import GpuGradients
from splatc.runtime.kernel import Kernel
from splatc.runtime.tensors import Shape
from tests.fake_gpu import FakeDriver, FakeTorch, fake_gpu, write_built
from tests.gradients_on_cpu import Kernels

torch = pytest.importorskip("torch")

from tests.dense_gradients import dense_attention, dense_gradients  # noqa: E402  (it imports torch)

D, DV = 16, 24
WIDE = ((200, 256), (136, 136), (192, 8))  # dV and dK by a kernel each, with small tiles, larger ones; by one kernel
HOPPER = Target("cuda", "sm_90a")
BLOCKS = P.mask(np.kron(np.eye(32, dtype=bool), np.ones((256, 256), bool)))
MIXED = P.causal() & (P.window(30, 0) | P.strided(32))  # two passes
walks = pytest.mark.parametrize("walks", GRADIENT_WALKS)


@cache
def signatures(spec: KernelSpec) -> dict[str, list[tuple[str, str]]]:
    """The parameters that the generated functions have, in the order of their launches."""
    emitted = emit(spec)
    declared = {one.name: one.parameters for one in parse_signatures(source_of(emitted, spec))}
    return {one.name: list(declared[one.name]) for one in emitted.functions}


class Machine:
    """Gradients of a pattern by the NumPy twins. tile: of the row kernel and, if it has 64 rows, of the columns' too;
    None for those of the plan."""

    def __init__(self, folder: Path, pattern: Any, walks: str | None, layout: str = "bhsd", sms: int = 3,
                 tile: tuple[int, int] | None = None, dims: tuple[int, int] = (D, DV)) -> None:  # fmt: skip
        self.pattern, self.layout, self.dims = pattern, layout, dims
        self.forward = kernel_spec(*dims, "float16", HOPPER)
        self.driver = FakeDriver({}, {}, sms=sms)
        gpu = fake_gpu(self.driver, FakeTorch())

        def rows(q_len: int, kv_len: int) -> Any:
            return best_plan(pattern, q_len, kv_len, two_walks(self.forward)[0], None if tile is None else (tile,))

        def one_walk(kv_len: int, q_len: int) -> Any:
            return make_plan(pattern.transposed(), kv_len, q_len, gradient_spec(self.forward))

        def columns(kv_len: int, q_len: int) -> Any:
            spec = two_walks(self.forward)[1]
            usual = spec.tile_m, spec.tile_n
            chosen = tile if tile is not None and tile[0] == 64 else usual
            return best_plan(pattern.transposed(), kv_len, q_len, spec, (chosen,))

        def find(spec: KernelSpec) -> Kernel:
            built = folder / spec.role
            built.mkdir(exist_ok=True)
            twins, functions = Kernels(*dims).functions(spec.tile_m, spec.tile_n), []
            for name, parameters in signatures(spec).items():
                unique = f"{spec.role} {name}"
                self.driver.parameters[unique], self.driver.kernels[unique] = parameters, twins[name]
                functions.append({"name": unique, "threads": 128, "smem_bytes": 1024, "parameters": parameters})
            write_built(built, functions)
            return Kernel(spec, built)

        self.sources = Sources(rows, columns, one_walk, gradient_spec(self.forward), two_walks(self.forward)[1:])
        self.gradients = GpuGradients(self.sources, find, layout, 0.0, walks, lambda _: gpu)

    def __call__(self, q: Any, k: Any, v: Any, o: Any, do: Any, lse: Any, dlse: Any, scale: float) -> list[Any]:
        (batch, heads, q_len, _), (_, kv_heads, kv_len, _) = q.shape, k.shape
        shape = Shape(batch, heads, kv_heads, q_len, kv_len, *self.dims, "float16", "cuda:0")
        q, k, v, o, do = (x.transpose(1, 2) if self.layout == "bshd" else x for x in (q, k, v, o, do))
        got = self.gradients(shape, q, k, v, o, lse, do, dlse, scale)
        return [x.transpose(1, 2) if self.layout == "bshd" else x for x in got]


def check(machine: Machine, q_len: int, kv_len: int | None = None, heads: int = 2, kv_heads: int = 2,
          batch: int = 1, seed: int = 0, moved: bool = False) -> None:  # fmt: skip
    """Each of dq, dk and dv is right. moved: the gradient of o lies where tensor maps cannot begin."""
    generator = torch.Generator().manual_seed(q_len + seed)
    kv_len, (d, dv) = kv_len or q_len, machine.dims

    def draw(*rows: int, dim: int) -> Any:
        """bshd memory, seen as bhsd."""
        return torch.randn(*rows, dim, generator=generator).half().transpose(1, 2)

    q, do = draw(batch, q_len, heads, dim=d), draw(batch, q_len, heads, dim=dv)
    k, v = draw(batch, kv_len, kv_heads, dim=d), draw(batch, kv_len, kv_heads, dim=dv)
    dlse = torch.randn(batch, heads, q_len, generator=generator)
    entries = machine.pattern.batch if isinstance(machine.pattern, P.PerBatch) else 0
    masks = [torch.from_numpy(one.dense(q_len, kv_len)) for one in patterns_of(machine.pattern, heads, entries)]
    mask = torch.stack(masks).view(max(entries, 1), heads, q_len, kv_len)
    keys, values = (x.repeat_interleave(heads // kv_heads, 1).double() for x in (k, v))
    scale = 1.2 / d**0.5
    o, lse, *_ = dense_attention(q.double(), keys, values, mask, scale)
    if moved:
        memory = torch.cat([do.new_zeros(1), do.transpose(1, 2).flatten()])
        do = memory[1:].view(batch, q_len, heads, dv).transpose(1, 2)
        assert do.data_ptr() % 16
    got = machine(q, k, v, o.half(), do, lse.float(), dlse, scale)
    errors = dense_gradients(q, k, v, mask, do, dlse, scale).errors(got)
    assert all(error < 5e-3 for error in errors.values()), errors


@walks
@pytest.mark.parametrize(
    ("pattern", "q_len", "kv_len"),
    [(P.window(30, 10), 300, 300), (P.strided(7), 400, 400), (MIXED, 300, 300), (P.causal("bottom_right"), 200, 300),
     (P.causal("bottom_right") & ~P.global_rows(3) & ~P.global_cols(20), 300, 200), (P.window(-2000, 2005), 200, 200),
     (P.neighborhood((20, 12), 5), 240, 240), (P.full(), 1, 1)],
    ids=str,
)  # fmt: skip
def test_what_the_kernels_see(pattern: Any, q_len: int, kv_len: int, walks: str, tmp_path: Path) -> None:
    check(Machine(tmp_path, pattern, walks), q_len, kv_len)


def test_low_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 rows or keys; also where they are cut into parts."""
    free = lambda spec, workers: Costs(1.0, 0.0, 0.0, 0.0, 0.0, 1.0, workers, "")  # noqa: E731
    for i, pattern in enumerate((MIXED, P.neighborhood((20, 12), 5), P.global_rows(3) | P.window(9, 0))):
        (tmp_path / str(i)).mkdir()
        machine = Machine(tmp_path / str(i), pattern, "two", sms=16, tile=(64, 64))
        check(machine, 240, batch=2 - i // 2)
        monkeypatch.setattr("splatc.runtime.gradient_walks.costs_of", free)
    assert any(name.endswith("combine_kernel") for name, _, _ in machine.driver.launched)


@walks
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_batch_and_grouped_heads(walks: str, layout: str, tmp_path: Path) -> None:
    check(Machine(tmp_path, MIXED, walks, layout), 200, heads=4, kv_heads=2, batch=2)


def test_tensors_like_those_before_are_looked_at_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Any] = []
    readable = gradients_gpu.readable

    def counted(x: Any) -> Any:
        looked.append(x)
        return readable(x)

    monkeypatch.setattr(gradients_gpu, "readable", counted)
    machine = Machine(tmp_path, MIXED, None)
    for sizes, looks in (({}, True), ({"seed": 1}, False), ({"seed": 2, "moved": True}, True), ({"seed": 3}, False),
                         ({"kv_heads": 1}, True), ({"batch": 2}, True), ({"batch": 2, "seed": 4}, False)):  # fmt: skip
        check(machine, 200, **sizes)
        assert len(looked) == 5 * looks, sizes
        looked.clear()


@walks
@pytest.mark.parametrize("each", ["entry", "head"])
def test_patterns_for_each_batch_entry(walks: str, each: str, tmp_path: Path) -> None:
    entries = [MIXED, P.documents([90, 110]) & P.causal(), P.full()]
    if each == "head":  # of which the query heads of a key head share theirs, or do not
        entries = [P.per_head([MIXED, MIXED, P.full(), P.full()]), P.per_head([P.full(), MIXED] * 2), P.full()]
    check(Machine(tmp_path, P.per_batch(entries), walks), 200, heads=4, kv_heads=2, batch=3)


@walks
def test_a_pattern_for_each_head(walks: str, tmp_path: Path) -> None:
    heads = P.per_head([MIXED, P.full(), P.strided(7), MIXED])
    check(Machine(tmp_path, heads, walks), 200, heads=4, kv_heads=2)


@walks
def test_long_rows_in_parts(walks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several passes: the parts of a later one are added to what is there."""
    free = lambda spec, workers: Costs(1.0, 0.0, 0.0, 0.0, 0.0, 1.0, workers, "")  # noqa: E731
    monkeypatch.setattr("splatc.runtime.gradient_walks.costs_of", free)
    for i, pattern in enumerate((P.longformer(20, 8), MIXED | P.global_rows(3) | P.global_cols(3))):
        (tmp_path / str(i)).mkdir()
        machine = Machine(tmp_path / str(i), pattern, walks, sms=16)
        check(machine, 900)
        names = [name.partition("splatc_gradient_")[2] for name, _, _ in machine.driver.launched]
        assert names.count("combine_kernel") >= (1 if walks == "one" else 2)


@pytest.mark.parametrize("dims", WIDE, ids=str)
def test_wide_heads(dims: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two walks, whatever they cost; the second one once more for dK where it is not made with dV."""
    cases = ((MIXED, "bshd", 2), (P.per_head([P.full(), P.strided(7)]), "bhsd", 1),
             (P.neighborhood((10, 14), 5), "bhsd", 1))  # fmt: skip
    for i, (pattern, layout, batch) in enumerate(cases):
        (tmp_path / str(i)).mkdir()
        check(Machine(tmp_path / str(i), pattern, "two", layout, dims=dims), 140, 140, 2, kv_heads=1, batch=batch)
    monkeypatch.setattr("splatc.runtime.gradient_walks.costs_of",
                        lambda spec, workers: Costs(1.0, 0.0, 0.0, 0.0, 0.0, 1.0, workers, ""))  # fmt: skip
    (tmp_path / "parts").mkdir()
    machine = Machine(tmp_path / "parts", MIXED | P.global_rows(3) | P.global_cols(3), "two", sms=16, dims=dims)
    check(machine, 500, 400, heads=1, kv_heads=1)
    names = [name.partition(" splatc_gradient_")[::2] for name, _, _ in machine.driver.launched]
    columns = [role for role, name in names if name == "columns_kernel"]
    assert set(columns) == ({"backward_columns"} if dims == WIDE[2] else {"backward_values", "backward_keys"})
    assert columns == sorted(columns, reverse=True)  # dV first
    assert all((role, "combine_kernel") in names for role in {*columns, "backward_rows"})


def test_lists_of_keys(tmp_path: Path) -> None:
    """In the walk over rows."""
    graph = P.mask(np.random.default_rng(0).random((600, 1000)) < 0.001)
    machine = Machine(tmp_path, graph, "two", tile=(128, 64))
    assert machine.sources.rows(600, 1000).spec.gather
    check(machine, 600, 1000)


def test_the_faster_way() -> None:
    """The fewer tiles, the better are two walks."""
    forward = kernel_spec(128, None, "bfloat16", HOPPER)
    shape = Shape(1, 16, 16, 8192, 8192, 128, 128, "bfloat16", "cuda:0")

    def chosen(pattern: Any, wanted: str | None = None) -> str:
        rows, *columns = two_walks(forward)
        sources = Sources(lambda q_len, kv_len: best_plan(pattern, q_len, kv_len, rows),
                          lambda kv_len, q_len: best_plan(pattern.transposed(), kv_len, q_len, columns[0]),
                          lambda kv_len, q_len: make_plan(pattern.transposed(), kv_len, q_len, columns[0]),
                          gradient_spec(forward), tuple(columns))  # fmt: skip
        return "one" if way_of(sources, shape, 132, wanted).rows is None else "two"

    assert chosen(P.full()) == chosen(P.causal()) == "one"
    assert chosen(P.window(256, 0)) == chosen(BLOCKS) == "two"
    assert chosen(P.full(), "two") == "two" and chosen(P.window(256, 0), "one") == "one"


class Recorder:
    """Gradients whose kernels do nothing, of two heads, 300 queries and as many keys."""

    def __init__(self, folder: Path, forward: KernelSpec) -> None:
        self.driver, self.folder = FakeDriver({}, {}, sms=3), folder
        gpu = fake_gpu(self.driver, FakeTorch())

        def columns(kv_len: int, q_len: int) -> Any:
            return make_plan(MIXED.transposed(), kv_len, q_len, gradient_spec(forward))

        sources = Sources(lambda q_len, kv_len: best_plan(MIXED, q_len, kv_len, two_walks(forward)[0]), columns,
                          columns, gradient_spec(forward), two_walks(forward)[1:])  # fmt: skip
        self.gradients = GpuGradients(sources, self.find, "bhsd", 0.0, "two", lambda _: gpu)

    def find(self, spec: KernelSpec) -> Kernel:
        built = self.folder / spec.name
        built.mkdir(exist_ok=True)
        functions = []
        for name, parameters in signatures(spec).items():
            unique = f"{spec.name} {name}"
            self.driver.parameters[unique], self.driver.kernels[unique] = parameters, lambda grid, **values: None
            functions.append({"name": unique, "threads": 128, "smem_bytes": 1024, "parameters": parameters})
        write_built(built, functions)
        return Kernel(spec, built)

    def __call__(self, terms: Terms, learning: tuple[bool, ...] | None = None) -> tuple[Any, dict[str, Any]]:
        """(the gradients, the arguments of the last walk over rows)."""
        q, k, v, o, do = (torch.randn(1, 2, 300, dim).half() for dim in (D, D, DV, DV, DV))
        shape = Shape(1, 2, 2, 300, 300, D, DV, "float16", "cuda:0")
        got = self.gradients(shape, q, k, v, o, torch.randn(1, 2, 300), do, None, 0.1, terms, learning)
        return got, [values for name, _, values in self.driver.launched if "rows_kernel" in name][-1]


def test_terms_reach_every_kernel(tmp_path: Path) -> None:
    """Launches know every parameter that generated functions have (else VerifyError), and fill in those of terms."""
    forward = kernel_spec(D, DV, "float16", HOPPER, score_of(False, True, True, True, True, True))
    machine = Recorder(tmp_path, forward)
    terms = Terms(torch.rand(2), torch.randn(2, 41), torch.randn(2, 5, 5), torch.randn(2), torch.tensor([7]),
                  block_size=64, shift=3, dropout_p=0.25)  # fmt: skip
    got, _ = machine(terms)
    assert [x.shape for x in got[3:]] == [x.shape for x in terms.learnable]
    launched = machine.driver.launched
    walked = [values for name, _, values in launched if "rows_kernel" in name or "columns_kernel" in name]
    assert len(walked) >= 2
    for values in walked:
        assert values["relative_ptr"] == terms.relative_bias.data_ptr() and values["reach"] == 20
        assert (values["block_size"], values["block_rows"], values["block_cols"], values["shift"]) == (64, 5, 5, 3)
        assert values["threshold"] == 2**30 and values["kept"] == pytest.approx(4 / 3)
    rows = [values for values in walked if "relative_sums_ptr" in values]
    assert rows and all(values["relative_sums_ptr"] and values["powers_ptr"] for values in rows)
    columns = [values for values in walked if "follow" in values]
    assert [values["follow"] for values in columns] == [0, *[1] * (len(columns) - 1)]  # the first overlaps the rows
    assert len({values["queue_ptr"] for values in walked}) == len(walked)


@pytest.mark.parametrize("sinks", [False, True])
def test_gradients_of_slopes_do_not_see_the_rounding_of_o(sinks: bool) -> None:
    """What the kernel leaves when delta is of a rounded O, in NumPy: the gradient is that of the O that was rounded."""
    heads, length, dim = 2, 100, 16
    rng = np.random.default_rng(0)
    q, k, v, do = rng.standard_normal((4, 1, heads, length, dim))
    dlse, mask = rng.standard_normal((1, heads, length)), P.causal().dense(length)
    mask[7] = False
    options = {"sinks": rng.standard_normal(heads)} if sinks else {}
    terms = Terms(alibi_slopes=np.array([0.02, 0.3]), **options)
    o, lse = oracle.attention(q, k, v, mask, terms=terms)
    wanted = oracle.gradients(q, k, v, mask, do, dlse, terms=terms)[3]
    far = np.abs(np.arange(length) - np.arange(length)[:, None])
    scores = q @ k.swapaxes(2, 3) / dim**0.5 - terms.alibi_slopes[:, None, None] * far
    probs = np.exp(scores - np.where(np.isneginf(lse), 0, lse)[..., None]) * mask
    delta = (do * o.round(1)).sum(-1) - dlse
    ds = probs * (do @ v.swapaxes(2, 3) - delta[..., None])
    rounded = -(ds * far).sum((0, 2, 3))
    tensors = Terms(**{name: torch.from_numpy(x) for name, x in vars(terms).items() if isinstance(x, np.ndarray)})
    shape = Shape(1, heads, heads, length, length, dim, dim, "float16", "cuda:0")
    biases = BiasGradients(tensors, ("alibi_slopes",), shape, *(torch.from_numpy(x).float() for x in (do, v, dlse)))
    tables, slopes = biases.powers.double().numpy()
    biases.sums["slope_sums"] += torch.from_numpy(np.rint(rounded * slopes).astype(np.int64))
    rows = np.stack([ds.sum(-1) * tables, (probs * far).sum(-1) * 2.0**DISTANCE_BITS], -1)
    biases.rows += torch.from_numpy(np.rint(rows).astype(np.int64))
    (got,) = biases.results(torch.from_numpy(lse), torch.from_numpy(delta))
    assert oracle.relative_error(rounded, wanted) > 1e-3 > 1e-6 > oracle.relative_error(got.numpy(), wanted)


def test_what_does_not_learn_costs_nothing(tmp_path: Path) -> None:
    """The kernel of dQ is the one for the biases that learn; no sums are made for others."""
    forward = kernel_spec(D, DV, "float16", HOPPER, score_of(False, True, True))
    machine = Recorder(tmp_path, forward)
    terms = Terms(torch.rand(2), torch.randn(2, 41))
    for flags, found in (((True, False), [(2,)]), ((False, True), [(2, 41)]), ((False, False), [])):
        got, rows = machine(terms, (*flags, False, False))
        assert [tuple(x.shape) for x in got[3:]] == found
        assert ("slope_sums_ptr" in rows, "row_sums_ptr" in rows, "relative_sums_ptr" in rows) == (
            flags[0], flags[0], flags[1])  # fmt: skip
        assert all(value for name, value in rows.items() if name.endswith("sums_ptr"))


@pytest.mark.parametrize("factor", [1e-30, 1e-3, 1.0, 1e4])
def test_sums_of_biases_fit_and_are_precise(factor: float) -> None:
    """The power is within a factor of 4 of the largest with which every sum of score gradients stays below 2^62."""
    generator = torch.Generator().manual_seed(0)
    do, v = (torch.randn(1, 2, 128, 16, generator=generator, dtype=torch.float32) for _ in range(2))
    do *= factor
    shape = Shape(1, 2, 2, 128, 128, 16, 16, "float16", "cuda:0")
    terms = Terms(alibi_slopes=torch.ones(2), relative_bias=torch.zeros(2, 9), dropout_p=0.5)
    biases = BiasGradients(terms, terms.learning(), shape, do, v, torch.zeros(1, 2, 128))
    tables, slopes = biases.powers.double().tolist()
    bound = 128 * 2 * 2 * float(do.norm(dim=-1).max() * v.norm(dim=-1).max())
    if factor == 1e-30:  # no larger ones
        assert tables == slopes == 2.0**100
    else:
        assert slopes * 128 == tables and tables == 2.0 ** round(math.log2(tables))
        assert 2.0**60 < tables * bound <= 2.0**62
