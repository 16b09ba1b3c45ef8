"""``splatc tune``: the fastest tile of a mask, measured and remembered; and the constants of the cost model."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from splatc.bench.gpu import calibrate as calibration
from splatc.bench.gpu import tune as tuning
from splatc.bench.gpu.tune import Sizes, Tried
from splatc.cli.masks import Dtype, HeadDim, KvLen, SeqLen, VHeadDim, sized_mask
from splatc.cli.output import console, print_json, progress, table, write_or_print
from splatc.codegen.kernel import KernelSpec, all_tiles, kernel_spec, not_hopper, tile_shapes
from splatc.codegen.target import Target, gpu_arch
from splatc.codegen.toolchain import INSTALL, find_compiler
from splatc.compile import best_plan
from splatc.config import Config
from splatc.errors import CompileError, InvalidInput, Unsupported
from splatc.patterns.base import Pattern
from splatc.patterns.heads import heads_of
from splatc.runtime.tuned import Found, Tile, remember_tile, tuned_file

HOPPER = Target("cuda", "sm_90a")

EXAMPLES = """\b
Examples:
  splatc tune 'causal & window(1024, 0)' --seq-len 16384 --head-dim 128
  splatc tune 'bigbird(64)' -s 4096 -d 64 --heads 32 --kv-heads 8 --no-remember
  splatc tune --calibrate -o costs.json"""


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog=EXAMPLES)(tune)


@dataclass(frozen=True)
class Request:
    """A mask and the call that is timed."""

    pattern: Pattern
    sizes: Sizes

    @property
    def spec(self) -> KernelSpec:
        """The kernel, with the most usual tile."""
        return kernel_spec(self.sizes.head_dim, self.sizes.v_head_dim, self.sizes.dtype, HOPPER)

    def model_tile(self) -> Tile:
        """What the cost model chooses."""
        found = best_plan(self.pattern, self.sizes.q_len, self.sizes.kv_len, self.spec, tile_shapes(self.spec)).spec
        return found.tile_m, found.tile_n

    def remember(self, best: Tried, device: str) -> Path:
        """Let later compilations use the best tile."""
        assert best.measured_us is not None
        found = Found(best.tile, device, best.measured_us)
        return remember_tile(self.pattern, self.sizes.q_len, self.sizes.kv_len, self.spec, found)


def tune(
    mask: Annotated[
        str | None,
        typer.Argument(
            metavar="PATTERN_OR_FILE",
            show_default=False,
            help="A pattern such as 'causal & window(256, 0)', or a mask file: .npy, .npz, .mtx, .txt, .splat",
        ),
    ] = None,
    seq_len: SeqLen = None,
    kv_len: KvLen = None,
    head_dim: HeadDim = 64,
    v_head_dim: VHeadDim = None,
    dtype: Dtype = None,
    batch: Annotated[int, typer.Option("--batch", help="Of the call that is timed.")] = 1,
    heads: Annotated[int, typer.Option("--heads", help="Query heads of that call.")] = 16,
    kv_heads: Annotated[int | None, typer.Option("--kv-heads", show_default="as many", help="Its key heads.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", help="Samples of each tile, taken in turn.")] = 15,
    remember: Annotated[bool, typer.Option(help="Let later compilations of this mask use the fastest tile.")] = True,
    json: Annotated[bool, typer.Option("--json", help="A JSON object on stdout.")] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure the constants of the cost model instead: no mask.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", show_default="stdout", help="Where --calibrate writes them.")
    ] = None,
) -> None:
    """Time a mask with every tile of the Hopper kernel and remember the fastest. Needs a Hopper GPU."""
    for name, value in (("--batch", batch), ("--heads", heads), ("--kv-heads", kv_heads), ("--rounds", rounds)):
        if value is not None and value < 1:
            raise InvalidInput(f"{name} is {value}: it must be at least 1")
    if calibrate:
        if mask is not None or json:
            raise InvalidInput("--calibrate measures masks of its own and writes JSON: give no pattern and no --json")
        _calibrate(rounds, output)
        return
    if mask is None:
        raise InvalidInput("give a pattern or a mask file to tune, or --calibrate")
    if output is not None:
        raise InvalidInput("-o is for --calibrate: a tuning is remembered beside the kernel cache")
    if remember and tuned_file(Config.from_env()) is None:
        raise InvalidInput("SPLATC_DISABLE_CACHE is set, so nothing can be remembered: unset it or give --no-remember")
    pattern, q_len, keys = sized_mask(mask, seq_len, kv_len)
    sizes = Sizes(q_len, keys, head_dim, v_head_dim or head_dim, batch, heads, kv_heads or heads,
                  dtype or "bfloat16")  # fmt: skip
    _tune(_checked(Request(pattern, sizes)), rounds, remember, json)


def _checked(request: Request) -> Request:
    """The request, or InvalidInput if there is nothing to choose for it or its sizes do not fit."""
    sizes = request.sizes
    spec = request.spec
    if (why := not_hopper(spec.head_dim, spec.v_head_dim, spec.dtype, HOPPER)) is not None:
        raise InvalidInput(f"there is nothing to tune: only the Hopper kernel has several tiles, and {why}")
    if sizes.heads % sizes.kv_heads:
        raise InvalidInput(f"--heads is {sizes.heads}, which {sizes.kv_heads} key heads cannot share: give a multiple")
    heads_of(request.pattern, sizes.heads)
    return request


def _tune(request: Request, rounds: int, remember: bool, json: bool) -> None:
    device, tiles = _hopper_gpu(), all_tiles("hopper", request.spec.dtype)
    with _shown(tuning.steps(tiles, rounds)) as tell:
        tried = tuning.tune(request.pattern, request.sizes, tiles, rounds, tell)
    best = tried[0]
    model = request.model_tile()
    if not json:
        console().print(table(COLUMNS, [_cells(one, best, model) for one in tried], _title(request, device), left=2))
    if best.measured_us is None:
        raise CompileError(f"no tile gives a kernel that works here, for one: {best.problem}")
    where = request.remember(best, device) if remember else None
    if json:
        print_json(_values(request, tried, model, device, where))
    else:
        console().print(_verdict(tried, model), soft_wrap=True)
        console().print(f"remembered in {where}" if where else "not remembered", soft_wrap=True)


def _calibrate(rounds: int, output: Path | None) -> None:
    device = _hopper_gpu()
    with _shown(calibration.steps(tuning.multiprocessors("cuda"), rounds)) as tell:
        found = calibration.calibrate(["splatc", *sys.argv[1:]], rounds, tell)
    rows = [(str(r.kernel), r.name, "" if r.fitted else "no", f"{r.measured_us:.1f}", f"{r.predicted_us:.1f}",
             f"{r.gap:+.1%}") for r in found.residuals]  # fmt: skip
    columns = ("kernel", "mask", "fitted", "measured us", "predicted us", "gap")
    console(stderr=True).print(table(columns, rows, f"Cost model on {device}", left=3))
    write_or_print(json_module.dumps(found.costs, indent=2) + "\n", output)


# -- what is needed ----------------------------------------------------------------------------------------------------


def _hopper_gpu() -> str:
    """The name of the Hopper GPU here, or Unsupported with what is missing."""
    arch = gpu_arch()
    if arch != HOPPER.arch:
        here = "torch sees none (`splatc doctor` says what is missing)" if arch is None else f"this one is {arch}"
        raise Unsupported(f"splatc tune measures on a Hopper GPU (H100, H200; {HOPPER.arch}), and {here}")
    if find_compiler() is None:
        raise Unsupported(f"splatc tune compiles kernels, which needs NVRTC or nvcc: {INSTALL}")
    import torch

    return str(torch.cuda.get_device_name())


@contextmanager
def _shown(total: int) -> Iterator[tuning.Tell]:
    """Tells steps on a progress bar; a GPU without enough memory is one line."""
    with progress() as bar:
        task = bar.add_task("", total=total)

        def tell(step: str) -> None:
            bar.update(task, advance=1, description=step)

        try:
            yield tell
        except RuntimeError as error:
            if type(error).__name__ == "OutOfMemoryError":  # torch's
                raise InvalidInput("the GPU's memory is too small: fewer --heads, or a smaller --batch") from None
            raise


# -- what is printed ---------------------------------------------------------------------------------------------------

COLUMNS = ("tile", "", "measured us", "predicted us", "useful TFLOP/s", "tile waste", "error")


def _cells(one: Tried, best: Tried, model: Tile) -> tuple[str, ...]:
    marks = ["fastest"] * (one is best and one.problem is None) + ["model's choice"] * (one.tile == model)
    name, mark = f"{one.tile[0]} x {one.tile[1]}", ", ".join(marks)
    if one.measured_us is None:
        return name, one.problem or "", *("",) * (len(COLUMNS) - 2)
    return (name, mark, f"{one.measured_us:.1f}", f"{one.predicted_us:.1f}", f"{one.useful_tflops:.1f}",
            f"{one.waste:.2f}", f"{one.error:.1e}")  # fmt: skip


def _title(request: Request, device: str) -> str:
    s = request.sizes
    text = str(request.pattern)
    text = text if len(text) < 100 else text[:97] + "..."
    dims = f"D={s.head_dim}" + (f", {s.v_head_dim}" if s.v_head_dim != s.head_dim else "")
    call = f"batch {s.batch}, {s.heads} heads ({s.kv_heads} of keys)"
    return f"{text}, {s.q_len} x {s.kv_len}, {dims}, {s.dtype}, {call}: {device}"


def _verdict(tried: list[Tried], model: Tile) -> str:
    best, chosen = tried[0], next((one for one in tried if one.tile == model), None)
    name = f"the fastest tile is {best.tile[0]} x {best.tile[1]}"
    if chosen is best:
        return f"{name}, as the cost model says"
    assert best.measured_us is not None
    if chosen is None or chosen.measured_us is None:
        return f"{name}; the cost model's choice, {model[0]} x {model[1]}, was not timed"
    more = chosen.measured_us / best.measured_us - 1
    return f"{name}; the cost model's choice, {model[0]} x {model[1]}, takes {more:.1%} longer"


def _values(request: Request, tried: list[Tried], model: Tile, device: str, where: Path | None) -> dict[str, Any]:
    return {
        "pattern": str(request.pattern), **asdict(request.sizes), "device": device, "best": list(tried[0].tile),
        "model": list(model), "tiles": [one.to_dict() for one in tried],
        "remembered": None if where is None else str(where),
    }  # fmt: skip
