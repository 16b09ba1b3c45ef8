"""``splatc compile`` and ``splatc dump``: what they compile, print and write."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import splatc
from splatc import patterns as P
from splatc.codegen.hopper.shape import shape_of
from splatc.codegen.kernel import kernel_spec
from splatc.codegen.target import Target
from splatc.compile import best_plan
from splatc.config import Config
from splatc.ir.passes import PASSES
from splatc.runtime.kernel import kernel_cache


def test_dump_cuda_to_a_file(cli, tmp_path):
    path = tmp_path / "kernel.cu"
    code, out, err = cli("dump", "causal", "--seq-len", 64, "--head-dim", 32, "--arch", "sm_90a", "-o", path)
    assert (code, out) == (0, "") and str(path) in err.replace("\n", "")
    text = path.read_text()
    assert "__global__" in text and "wgmma" in text  # for a GPU the default dtype is bfloat16
    code, out, _ = cli("dump", "causal", "-s", 64, "-d", 32, "--arch", "sm_90a", "--dtype", "float32")
    assert code == 0 and "__global__" in out and ".f32.tf32.tf32" in out
    code, out, _ = cli("dump", "causal", "-s", 64, "-d", 33, "--arch", "sm_90a", "--dtype", "float32")
    assert code == 0 and "__global__" in out and "wgmma" not in out


def test_tile_that_compile_would_take(cli):
    """For the mask: what is analyzed and dumped is what will run."""
    spec = kernel_spec(64, None, "bfloat16", Target("cuda", "sm_90a"))
    for mask in ("full", "neighborhood((64, 64), 13)", "window(100, 100)"):
        code, out, _ = cli("analyze", mask, "-s", 4096, "--target", "sm_90a", "--json")
        rows = json.loads(out)["tile"][0]
        chosen = best_plan(P.parse(mask), 4096, 4096, spec).spec
        assert code == 0 and rows == chosen.tile_m
        code, out, _ = cli("dump", mask, "-s", 4096, "--arch", "sm_90a")
        assert code == 0 and f"__launch_bounds__({128 + 2 * rows}, {shape_of(chosen).blocks})" in out


def test_dump_llvm_to_stdout(cli):
    code, out, _ = cli("dump", "causal", "-s", 64, "-d", 32, "--arch", "cpu", "-o", "-")
    assert code == 0 and "define" in out


def test_dump_the_kernel_for_gradients(cli):
    options = "causal", "-s", 100, "-d", 16, "--backward"
    code, out, _ = cli("dump", *options)
    assert code == 0 and "splatc_attention_dq" in out and "splatc_attention_dkv" in out
    code, out, _ = cli("dump", *options, "--what", "tables")
    first = next(line for line in out.splitlines() if "rows0[0, 0, 0]" in line)
    assert code == 0 and "cols0[64, 0, 0]" in first  # queries from 64 on attend to the first keys
    code, out, _ = cli("compile", "none", "-d", 16, "--target", "cpu", "--backward")
    assert code == 0 and "attention_backward_cpu_d16_float32" in out
    code, out, _ = cli("dump", *options, "--arch", "sm_90a", "--dtype", "bfloat16")
    assert code == 0 and "splatc_gradient_columns" in out
    code, out, _ = cli("dump", *options, "--arch", "sm_80")
    assert code == 0 and "splatc_gradient_dq" in out and "splatc_gradient_dkv" in out


def test_dump_one_of_the_kernels_for_gradients(cli):
    options = "causal", "-s", 256, "-d", 64, "--arch", "sm_90a", "--dtype", "bfloat16"
    code, out, err = cli("dump", *options, "--backward")
    assert code == 0 and "splatc_gradient_finish" in out
    assert "this is backward" in err and "backward_rows, backward_columns" in err
    code, out, err = cli("dump", *options, "--role", "backward_rows")
    assert code == 0 and "splatc_gradient_rows" in out and "splatc_gradient_columns" not in out and not err
    code, out, _ = cli("dump", *options, "--role", "backward_rows", "--what", "tables")
    first = next(line for line in out.splitlines() if "rows0[0, 0, 0]" in line)
    assert code == 0 and "cols0[0, 0, 0]" in first and "cols0[128, 0, 0]" not in first  # the mask's own rows
    code, _, err = cli("dump", *options, "--role", "backward_keys")
    assert code == 2 and "are backward, backward_rows, backward_columns" in err


def test_compiled_ahead_are_the_gradients_that_a_mask_takes(cli, monkeypatch):
    """Tiles are chosen for each walk by itself, as calls will choose them; without a mask there are all of them."""
    asked = []

    def find(spec):
        asked.append(spec)
        return SimpleNamespace(folder=kernel_cache(Config.from_env()).root / spec.name)

    monkeypatch.setattr(sys.modules["splatc.cli.build"], "find_kernel", find)
    options = "-d", 64, "--dtype", "bfloat16", "--target", "sm_90a", "--backward"
    assert cli("compile", "bigbird(64)", "-s", 4096, *options)[0] == 0
    attend = splatc.compile("bigbird(64)", seq_len=4096, head_dim=64, dtype="bfloat16", target="sm_90a")
    sources = attend.gradients.sources
    walks = sources.rows(4096, 4096), sources.columns(4096, 4096)
    chosen = {one.role: one for one in (sources.one, *(plan.spec for plan in walks))}
    assert {one.role: one for one in asked} == chosen and chosen["backward_columns"].tile_m == 64
    asked.clear()
    assert cli("compile", "none", *options)[0] == 0
    assert len(asked) == len(set(asked)) > len(chosen) and set(chosen.values()) <= set(asked)


def test_dump_tir(cli):
    code, out, _ = cli("dump", "causal", "-s", 64, "-d", 32, "--arch", "cpu", "--what", "tir")
    assert code == 0 and "tvm.script" in out


@pytest.mark.parametrize("name", ["lower", *(p.__name__ for p in PASSES)])
def test_dump_ir_after_each_pass(cli, name):
    code, out, _ = cli("dump", "causal & fixed(32, 4)", "-s", 128, "--after", name)
    assert code == 0 and out.startswith("attention(q: 128")
    assert ("attend(" in out) == (name not in ("lower", "choose_views"))


def test_dump_ir_by_heads(cli, tmp_path):
    np.save(tmp_path / "heads.npy", np.stack([P.causal().dense(64), P.full().dense(64), P.causal().dense(64)]))
    code, out, _ = cli("dump", tmp_path / "heads.npy", "--what", "ir")
    assert code == 0 and "// heads 0, 2\n" in out and "// heads 1\n" in out


def test_dump_tables_as_text(cli):
    code, out, _ = cli("dump", "causal", "-s", 100, "--what", "tables")
    assert code == 0 and "cols0[64, 0, 0]" in out
    picture = [line for line in out.splitlines() if line and set(line) <= {"#", "."}]
    assert picture[2].startswith("###.")


def test_dump_tables_round_trip(cli, tmp_path):
    code, _, _ = cli("dump", "causal", "-s", 100, "--what", "tables", "-o", tmp_path / "t.npz")
    assert code == 0
    with np.load(tmp_path / "t.npz") as saved:
        parts = "bits", "col_views", "entries", "gather", "items", "positions", "row_views"
        assert sorted(saved) == [f"pass0_{part}" for part in parts]
        assert saved["pass0_items"].dtype == np.int32 and saved["pass0_bits"].dtype == np.uint32
        assert saved["pass0_row_views"][0, 0] == 100


def test_dump_refuses(refused, cli, tmp_path):
    message = refused("dump", "causal", "-s", 8, "--after", "fuse")
    assert all(p.__name__ in message for p in PASSES)
    assert "--arch" in refused("dump", "causal", "-s", 8, "--arch", "cpu", "--what", "cuda")
    assert "--arch" in refused("dump", "causal", "-s", 8, "--arch", "sm_90a", "--what", "llvm")
    assert "--what" in refused("dump", "causal", "-s", 8, "--what", "tables", "--after", "lower")
    refused("dump", "documents([3, 4])", "-s", 8, "--arch", "cpu", "--what", "tir")
    code, _, err = cli("dump", "causal", "-s", 8, "--what", "ir", "-o", tmp_path / "none" / "x")
    assert code == 1 and "No such file" in err


def test_dump_ptx_says_that_it_needs_a_cuda_compiler(cli, monkeypatch):
    monkeypatch.setattr("splatc.cli.build.find_compiler", lambda: None)
    code, _, err = cli("dump", "causal", "-s", 8, "--arch", "sm_80", "--what", "ptx")
    assert code == 1 and "nvcc" in err and "splatc[cuda]" in err
    code, _, err = cli("compile", "none", "--target", "sm_80")
    assert code == 1 and "nvcc" in err and "splatc[cuda]" in err


def test_compile_prints_its_folder(cli, refused, monkeypatch):
    code, out, _ = cli("compile", "none", "-d", 32, "--target", "cpu")
    assert code == 0
    again = cli("compile", "causal", "-s", 64, "-d", 32, "--target", "cpu")
    assert again[:2] == (0, out)
    report = json.loads((Path(out.strip()) / "report.json").read_text())
    assert report["target"].startswith("cpu:")
    monkeypatch.setenv("SPLATC_DISABLE_CACHE", "1")
    assert "SPLATC_DISABLE_CACHE" in refused("compile", "none", "-d", 32, "--target", "cpu")
