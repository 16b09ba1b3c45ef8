"""``splatc demo``: what ``make demo`` runs. A dozen masks, compiled, timed and checked against float64."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from splatc.bench.cases import documents
from splatc.cli.output import console, note, percent, progress, size, table
from splatc.codegen.kernel import kernel_spec
from splatc.codegen.target import Target, gpu_arch, resolve_target
from splatc.errors import InvalidInput, SplatcError, Unsupported
from splatc.patterns.base import Pattern

MAX_ERROR = 1e-5
ROUNDS = 5
HEADS, HEAD_DIM = 2, 64
ARCH = "sm_90a"
COLUMNS = ("pattern", "density", "pieces", "tiles", "waste", "time", "error")

EXAMPLES = """\b
Examples:
  splatc demo
  splatc demo --seq-len 4096 -o out/demo"""


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog=EXAMPLES)(demo)


def demo(
    seq_len: Annotated[int, typer.Option("--seq-len", "-s", help="Queries and keys, 64 to 16384.")] = 1024,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the CUDA source and the picture.")] = Path(
        "splatc-demo"
    ),
    target: Annotated[
        str | None, typer.Option("--target", show_default="the GPU here, else the CPU", help="cpu or cuda.")
    ] = None,
) -> None:
    """Compile and run a dozen masks and check each against a float64 reference; write CUDA for a GPU, and a picture.

    Exit code 1 if an error exceeds 1e-5.
    """
    if not 64 <= seq_len <= 16384:
        raise InvalidInput(f"--seq-len is {seq_len}: the demo takes 64 to 16384 (its reference is dense)")
    import splatc
    from splatc.oracle import attention, relative_error

    spec = kernel_spec(HEAD_DIM, None, "float32", resolve_target(target or ("cuda" if gpu_arch() else "cpu")),
                       allow_tf32=False)  # fmt: skip
    where = _processor(spec.target)
    console().print(f"float32 attention, {HEADS} heads of {HEAD_DIM}, {seq_len} queries and keys, on {where}")
    rng = np.random.default_rng()
    q, k, v = (rng.standard_normal((1, HEADS, seq_len, HEAD_DIM), np.float32) for _ in range(3))
    given = _given(spec.target, q, k, v)
    rows, wrong = [], []
    cases = _patterns(seq_len)
    with progress() as bar:
        task = bar.add_task(f"compiling for {spec.target}", total=len(cases))
        for pattern in cases.values():
            attend = splatc.compile(
                pattern,
                seq_len=seq_len,
                head_dim=HEAD_DIM,
                dtype="float32",
                target=str(spec.target.arch) if spec.target.kind == "cuda" else "cpu",
                allow_tf32=False,
            )
            error = relative_error(_numpy(attend(*given)), attention(q, k, v, pattern.dense(seq_len))[0])
            seconds = _median(lambda attend=attend: _finish(attend(*given)))  # type: ignore[misc]
            e = attend.explain()
            rows.append(
                (
                    _name(pattern),
                    percent(e.density),
                    e.pieces,
                    e.tiles,
                    f"{e.waste:.2f}",
                    f"{seconds * 1e3:.2f} ms",
                    f"{error:.1e}",
                )
            )
            if not error < MAX_ERROR:
                wrong.append(f"{_name(pattern)}: relative error {error:.1e}")
            bar.update(task, advance=1, description="compiling, running, checking")
    console().print(table(COLUMNS, rows))
    console().print(
        "error: relative to float64 (below 1e-5 is right for float32); waste: computed / kept; the first row "
        "is dense attention",
        soft_wrap=True,
    )
    output.mkdir(parents=True, exist_ok=True)
    _write_cuda(output)
    _write_picture(output, seq_len)
    if wrong:
        for line in wrong:
            note(f"splatc: {line}, more than {MAX_ERROR:.0e}: please report this")
        raise typer.Exit(1)


def _patterns(n: int) -> dict[str, Pattern]:
    from splatc import patterns as P

    side = 1 << (n.bit_length() - 1) // 2
    w = max(n // 16, 4)
    cases = {
        "full": P.full(),
        "causal": P.causal(),
        "window": P.window(w, w),
        "causal window": P.causal() & P.window(2 * w, 0),
        "dilated": P.dilated(4 * w, 4 * w, 4),
        "strided": P.strided(16),
        "sparse transformer": P.causal() & (P.window(31, 0) | P.strided(32)),
        "fixed": P.causal() & P.fixed(64, 8),
        "longformer": P.longformer(w, 16),
        "bigbird": P.bigbird(64, 3, 1, 2),
        "sink": P.causal() & (P.sink(4) | P.window(2 * w, 0)),
        "prefix": P.causal() | P.prefix(n // 8),
        "documents": P.causal() & documents(n, 5),
        "random": P.mask(np.random.default_rng(0).random((n, n)) < 0.02),
    }
    if n % side == 0:
        cases["neighborhood"] = P.neighborhood((n // side, side), 7)
    return cases


def _name(pattern: Pattern) -> str:
    text = str(pattern)
    return text if len(text) <= 52 else f"{text[:49]}..."


def _processor(target: Target) -> str:
    if target.kind == "cpu":
        from splatc.runtime.cpu_call import workers

        return f"the CPU, {workers()} threads"
    import torch

    return f"{torch.cuda.get_device_name()} ({target.arch})"


def _given(target: Target, *arrays: Any) -> list[Any]:
    """The inputs where the kernel wants them."""
    if target.kind == "cpu":
        return list(arrays)
    import torch

    if not torch.cuda.is_available():
        raise Unsupported(f"no GPU here to run {target}: leave out --target, or use `splatc dump --arch {target.arch}`")
    return [torch.from_numpy(x).cuda() for x in arrays]


def _numpy(o: Any) -> Any:
    return o if isinstance(o, np.ndarray) else o.cpu().numpy()


def _finish(o: Any) -> None:
    if not isinstance(o, np.ndarray):
        import torch

        torch.cuda.synchronize()


def _median(call: Callable[[], Any]) -> float:
    samples = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        call()
        samples.append(time.perf_counter() - began)
    return statistics.median(samples)


def _write_cuda(folder: Path) -> None:
    """The CUDA for a GPU that need not be here."""
    from splatc.codegen.build import cuda_source

    path = folder / f"attention_{ARCH}.cu"
    try:
        with console(stderr=True).status(f"generating CUDA for {ARCH}"):
            spec = kernel_spec(HEAD_DIM, None, "bfloat16", Target("cuda", ARCH))
            path.write_text(cuda_source(spec)[1], encoding="utf-8")
    except SplatcError as error:
        note(f"no CUDA for {ARCH} written: {error}")
        return
    console().print(
        f"CUDA for {ARCH} (bfloat16; serves all these masks): {path} ({size(path.stat().st_size)})", soft_wrap=True
    )


def _write_picture(folder: Path, seq_len: int) -> None:
    from splatc.draw import Drawing, save

    path = folder / "sparse_transformer.png"
    try:
        save(Drawing.of(_patterns(seq_len)["sparse transformer"], seq_len), path)
    except Unsupported as error:
        note(f"no picture drawn: {error}")
        return
    console().print(f"picture of {_name(_patterns(seq_len)['sparse transformer'])}: {path}", soft_wrap=True)
