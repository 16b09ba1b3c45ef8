"""The command line: what it prints, what it writes, its exit codes. Commands run in this process unless said."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

import splatc
from splatc import patterns as P
from splatc.cli import output
from splatc.cli.main import app, run
from splatc.errors import CacheError, CompileError, InvalidInput
from splatc.runtime.cache import KernelCache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An own cache with three entries, the first built first."""
    monkeypatch.setenv("SPLATC_CACHE_DIR", str(tmp_path / "cache"))
    store = KernelCache(tmp_path / "cache", 1 << 30)

    def build(folder):
        (folder / "kernel.ll").write_bytes(b"x" * 1000)

    for i in range(3):
        store.get_or_build({"target": "cpu:native", "number": i}, build, label=f"kernel_{i}")
    return store


def splatc_process(*arguments, **options):
    command = [sys.executable, "-m", "splatc", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


# -- the program itself ------------------------------------------------------------------------------------------------


def test_help_is_quick_and_loads_nothing_heavy():
    script = (
        "import sys\nfrom splatc.cli.main import run\nrun(['--help'])\n"
        "assert not {'torch', 'tvm', 'scipy', 'networkx', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name in ("analyze", "show", "dump", "compile", "demo", "bench", "cache", "doctor"):
        assert name in done.stdout


def commands():
    return [c.name or c.callback.__name__.replace("_", "-") for c in app.registered_commands]


@pytest.mark.parametrize("command", [*commands(), "cache list", "cache show", "cache clear", "cache prune"])
def test_every_command_has_help_with_examples(cli, command):
    code, out, _ = cli(*command.split(), "--help")
    assert code == 0 and "Examples:" in out and f"splatc {command}" in out


def test_version(cli):
    code, out, _ = cli("--version")
    assert code == 0 and out.startswith("splatc ")


def test_no_command_prints_help(cli):
    code, out, err = cli()
    assert code == 0 and "Usage:" in out and not err


@pytest.mark.parametrize("error, code", [
    (InvalidInput("no"), 2), (CompileError("no"), 1), (CacheError("no"), 1), (KeyboardInterrupt(), 130),
    (MemoryError(), 1), (FileNotFoundError(2, "No such file or directory", "x"), 1)])  # fmt: skip
def test_exit_codes(cli, monkeypatch, error, code):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("splatc.cli.look.plan_mask", fail)
    got, out, err = cli("analyze", "causal", "-s", 8)
    assert (got, out) == (code, "") and "Traceback" not in err
    assert code == 130 or err.startswith("splatc: ")


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("splatc.cli.look.plan_mask", fail)
    with pytest.raises(ZeroDivisionError):
        run(["analyze", "causal", "-s", "8"])


def test_a_closed_pipe_is_quiet():
    command = [sys.executable, "-m", "splatc", "analyze", "causal", "-s", "2000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # before it has started
        assert process.stderr.read() == ""
        assert process.wait(60) == 1


def test_wrong_environment_is_one_line(refused, monkeypatch):
    monkeypatch.setenv("SPLATC_CACHE_SIZE", "plenty")
    assert "SPLATC_CACHE_SIZE" in refused("analyze", "causal", "-s", 8)


@pytest.mark.parametrize("arguments, words", [
    (["analyze"], "Missing argument"),
    (["analyse"], "analyse"),
    (["analyze", "causal", "--lenght", 3], "--lenght"),
    (["analyze", "causal", "-s", "many"], "integer"),
    (["dump", "causal", "-s", 8, "--what", "ptxx"], "ptxx"),
])  # fmt: skip
def test_usage_errors(refused, arguments, words):
    message = refused(*arguments)
    assert words in message and "--help" in message


# -- analyze -----------------------------------------------------------------------------------------------------------


def test_analyze_json_is_the_contract(cli):
    code, out, err = cli("analyze", "causal & window(9, 0)", "--seq-len", 300, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    mask = (P.causal() & P.window(9, 0)).dense(300)
    assert found["nnz"] == mask.sum()
    assert found["density"] == pytest.approx(mask.mean())
    assert found["remainder_nnz"] == 0
    assert found["pieces"] == len(splatc.analyze("causal & window(9, 0)", 300).pieces)
    assert found["waste"] == pytest.approx(found["tile_area"] / found["nnz"])
    assert found["tile_area"] % found["tiles"] == 0


def test_analyze_table_and_pieces(cli):
    code, out, _ = cli("analyze", "fixed(32, 4)", "-s", 256, "--pieces")
    assert code == 0
    for word in ("density", "pieces", "tiles", "waste", "predicted", "cols"):
        assert word in out


def test_analyze_rectangular_and_target(cli):
    code, out, _ = cli(
        "analyze", "causal", "-s", 10, "--kv-len", 30, "--json", "--target", "sm_90a", "--dtype", "bfloat16"
    )
    found = json.loads(out)
    assert code == 0 and found["nnz"] == 55 and found["target"] == "cuda:sm_90a" and found["kv_len"] == 30


def test_analyze_a_million_rows(cli):
    assert cli("analyze", "window(256, 256)", "-s", 1 << 20, "--json")[0] == 0


def test_analyze_compiles_nothing(cli, monkeypatch):
    # splatc.compile, as an attribute, is the function
    compiler = sys.modules["splatc.compile"]
    monkeypatch.setattr(compiler, "find_kernel", lambda spec: pytest.fail("a kernel was asked for"))
    assert cli("analyze", "bigbird(16)", "-s", 200)[0] == 0


@pytest.mark.parametrize("kind", ["npy", "npz", "mtx", "txt", "heads.npy"])
def test_analyze_files(cli, tmp_path, kind):
    mask = P.strided(4).dense(40, 60)
    path = tmp_path / f"mask.{kind}"
    if kind == "npy":
        np.save(path, mask)
    elif kind == "heads.npy":
        np.save(path, np.stack([mask, mask, ~mask]))
    elif kind == "npz":
        np.savez(path, mask=mask)
    elif kind == "mtx":
        scipy_io = pytest.importorskip("scipy.io")
        sparse = pytest.importorskip("scipy.sparse")
        scipy_io.mmwrite(path, sparse.coo_array(mask.astype(int)))
    else:
        path.write_text("strided(4)  # a comment\n")
    lengths = ["-s", 40, "--kv-len", 60] if kind == "txt" else []
    code, out, err = cli("analyze", path, "--json", *lengths)
    assert code == 0, err
    found = json.loads(out)
    assert (found["q_len"], found["kv_len"]) == (40, 60)
    assert found["nnz"] == (mask.size if kind == "heads.npy" else mask.sum())


def test_analyze_refuses(refused, tmp_path):
    assert "causl" in refused("analyze", "causl()", "-s", 8)
    refused("analyze", "causal & (", "-s", 8)
    refused("analyze", "__import__('os')", "-s", 8)
    refused("analyze", "window(1, 2, 3, 4)", "-s", 8)
    refused("analyze", "\0", "-s", 8)
    refused("analyze", "(" * 5000, "-s", 8)
    assert "--seq-len" in refused("analyze", "causal")
    assert "--seq-len is 0" in refused("analyze", "causal", "-s", 0)
    assert "--kv-len is -3" in refused("analyze", "causal", "-s", 8, "--kv-len", -3)
    assert "no such file" in refused("analyze", "none.npy")
    assert "head_dim" in refused("analyze", "causal", "-s", 8, "--head-dim", 0)
    assert "dtype" in refused("analyze", "causal", "-s", 8, "--dtype", "int8")
    assert "sm_" in refused("analyze", "causal", "-s", 8, "--target", "tpu")
    np.save(tmp_path / "mask.npy", np.ones((8, 8), bool))
    assert "8" in refused("analyze", tmp_path / "mask.npy", "-s", 9)
    (tmp_path / "broken.npy").write_bytes((tmp_path / "mask.npy").read_bytes()[:-3])
    assert "broken.npy" in refused("analyze", tmp_path / "broken.npy")
    (tmp_path / "junk.npy").write_bytes(b"junk")
    assert "junk.npy" in refused("analyze", tmp_path / "junk.npy")
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    assert "objects.npy" in refused("analyze", tmp_path / "objects.npy")
    np.save(tmp_path / "line.npy", np.ones(8, bool))
    refused("analyze", tmp_path / "line.npy")
    assert "documents" in refused("analyze", "documents([3, 4])", "-s", 8)


# -- show --------------------------------------------------------------------------------------------------------------


def test_show_in_a_pipe_and_in_a_file(cli, tmp_path):
    code, out, _ = cli("show", "causal & window(20, 0)", "-s", 200)
    assert code == 0 and "density" in out and "waste" in out and "⣿" in out and "\x1b" not in out
    code, _, err = cli("show", "causal", "-s", 200, "-o", tmp_path / "mask.svg")
    assert code == 0 and "mask.svg" in err.replace("\n", "")
    assert (tmp_path / "mask.svg").read_text().startswith("<?xml")


def test_show_refuses(refused, tmp_path):
    assert ".png" in refused("show", "causal", "-s", 8, "-o", tmp_path / "mask.jpeg2000")


# -- cache -------------------------------------------------------------------------------------------------------------


def test_cache_list_show(cli, refused, cache):
    code, out, _ = cli("cache", "list")
    assert code == 0 and "kernel_0" in out and "3 kernels" in out and "KiB" in out
    entries = json.loads(cli("cache", "list", "--json")[1])
    assert {e["label"] for e in entries} == {"kernel_0", "kernel_1", "kernel_2"}
    code, out, _ = cli("cache", "show", "kernel_1")
    assert code == 0 and "kernel.ll" in out and "cpu:native" in out
    assert json.loads(cli("cache", "show", "kernel_1", "--json")[1])["key_fields"]["number"] == 1
    assert "splatc cache list" in refused("cache", "show", "nothing")


def test_cache_prune(cli, refused, cache):
    assert "--older-than" in refused("cache", "prune", "--older-than", "long")
    assert "--max-size" in refused("cache", "prune", "--max-size", "big")
    assert cli("cache", "prune", "--older-than", "1h")[0] == 0
    assert len(cache.entries()) == 3
    limit = sum(entry.size for entry in cache.entries()) - 1
    code, out, err = cli("cache", "prune", "--max-size", limit)
    assert code == 0 and "kernel_" in out and "deleted 1 kernel," in err
    assert len(cache.entries()) == 2


def test_cache_clear_asks(cli, cache, monkeypatch):
    monkeypatch.setattr("typer.confirm", lambda *_, **__: False)
    assert cli("cache", "clear")[0] == 1 and len(cache.entries()) == 3
    assert cli("cache", "clear", "--yes")[0] == 0 and not cache.entries()
    assert cli("cache", "list")[0] == 0


def test_cache_clear_without_an_answer(cache):
    done = splatc_process("cache", "clear", stdin=subprocess.DEVNULL)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert len(cache.entries()) == 3


def test_cache_off(refused, monkeypatch):
    monkeypatch.setenv("SPLATC_DISABLE_CACHE", "1")
    assert "SPLATC_DISABLE_CACHE" in refused("cache", "list")


# -- doctor and demo ---------------------------------------------------------------------------------------------------


def test_doctor(cli):
    code, out, _ = cli("doctor", "--json")
    assert code == 0
    found = {f["what"]: f for f in json.loads(out)}
    assert found["tvm"]["works"] and "LLVM" in found["tvm"]["detail"]
    assert found["C compiler"]["works"] and found["cache folder"]["works"]


def test_doctor_finds_what_is_missing(cli, monkeypatch, tmp_path):
    monkeypatch.setattr("splatc.cli.doctor.shutil.which", lambda *_: None)
    monkeypatch.setattr("splatc.cli.doctor._tvm", lambda: 1 / 0)
    monkeypatch.setattr("splatc.cli.doctor._torch", lambda: 1 / 0)
    monkeypatch.setenv("SPLATC_CACHE_DIR", str(tmp_path / "open"))
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    code, out, _ = cli("doctor")
    assert code == 1 and "MISSING" in out and "apt install gcc" in out and "chmod" in out and "ZeroDivisionError" in out


@pytest.mark.slow
def test_demo(cli, tmp_path):
    code, out, _ = cli("demo", "-s", 256, "-o", tmp_path / "demo", "--target", "cpu")
    assert code == 0
    rows = [line for line in out.splitlines() if " ms " in line and "e-" in line]
    assert len(rows) >= 10
    assert "__global__" in next((tmp_path / "demo").glob("*.cu")).read_text()


def test_demo_fails_when_a_result_is_wrong(cli, monkeypatch, tmp_path):
    monkeypatch.setattr("splatc.cli.demo._patterns", lambda n: {"sparse transformer": P.causal()})
    monkeypatch.setattr("splatc.cli.demo._write_cuda", lambda folder: None)
    monkeypatch.setattr("splatc.oracle.relative_error", lambda *_: 2e-5)
    code, _, err = cli("demo", "-s", 64, "-o", tmp_path, "--target", "cpu")
    assert code == 1 and "2.0e-05" in err


def test_demo_refuses(refused, tmp_path):
    assert "--seq-len" in refused("demo", "-s", 1 << 20, "-o", tmp_path)


# -- numbers for people ------------------------------------------------------------------------------------------------


def test_numbers():
    assert [output.size(n) for n in (0, 1023, 1024, 3 << 20, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "3.0 MiB",
        "5.0 TiB",
    ]
    assert [output.seconds(s) for s in (3e-6, 4.2e-3, 1.5)] == ["3 us", "4.2 ms", "1.50 s"]
    assert [output.percent(s) for s in (0, 1, 0.123, 0.00123, 1e-6)] == ["0.0%", "100.0%", "12.3%", "0.12%", "1e-06"]
