"""Shared by all tests: one kernel cache for the whole run, golden files, calls of the command line, Hypothesis."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from splatc.runtime.tuned import NAME

GOLDEN = Path(__file__).parent / "golden"

settings.register_profile("splatc", deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
settings.load_profile("splatc")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the files under tests/golden")
    parser.addoption("--every-lane", action="store_true", help="kernels that racecheck can follow (decision 35)")


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # many test processes share a GPU's memory
    if workers := config.getoption("tx", None):  # pytest-xdist's processes share the cores, instead of each taking all
        os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // len(workers), 1)))
    if config.getoption("--every-lane"):
        from splatc.codegen.hopper import ring

        ring.EVERY_LANE = True
        os.environ.pop("SPLATC_CACHE_DIR", None)  # nobody else's kernels
    # Set before pytest-xdist starts its workers, which inherit it: each kernel is compiled once a run.
    if not os.environ.get("SPLATC_CACHE_DIR"):
        folder = tempfile.mkdtemp(prefix="splatc-test-cache-")
        os.environ["SPLATC_CACHE_DIR"] = folder

        def forget() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            os.environ.pop("SPLATC_CACHE_DIR", None)

        config.add_cleanup(forget)


@pytest.fixture
def tuned_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What tunings are remembered in: of an own cache folder, which does not exist yet."""
    monkeypatch.setenv("SPLATC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SPLATC_DISABLE_CACHE", raising=False)
    return tmp_path / "cache" / NAME


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: tiny models are no faster on more."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """cli(arguments) -> (exit code, stdout, stderr), of the command line in this process."""
    from splatc.cli.main import run

    def call(*arguments: object) -> tuple[int, str, str]:
        code = run([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def refused(cli: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """The one-line error of a command that must fail with exit code 2."""

    def call(*arguments: object) -> str:
        code, out, err = cli(*arguments)
        assert (code, out) == (2, ""), (code, out, err)
        assert err.startswith("splatc: ") and "Traceback" not in err
        return err.splitlines()[0].removeprefix("splatc: ")

    return call


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """golden(text): text equals tests/golden/<test file>/<test name>.txt (--update-golden rewrites it)."""
    name = request.node.name.translate(str.maketrans("[]/ ", "____")).rstrip("_")
    path = GOLDEN / Path(request.node.path).stem / f"{name}.txt"

    def check(text: str) -> None:
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return
        assert path.is_file(), f"{path} is missing: run pytest --update-golden and review the file"
        assert text == path.read_text(), f"{path} differs: review it, then run pytest --update-golden"

    return check


@pytest.fixture
def eager_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views are chosen by estimate alone and passes are free, so that short masks go through all kinds of them."""
    from splatc.ir import choose

    for name, value in (("FEW_TILES", 0), ("CLEARLY", 0), ("PASS_TILES", -100.0)):
        assert hasattr(choose, name)
        monkeypatch.setattr(choose, name, value)
