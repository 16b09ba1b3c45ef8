"""What people copy works: every example runs, every python block of the documentation runs and prints what it says.

A ```text block right after a ```python block is what that prints ("..." stands for anything); --update-golden rewrites
it. The python blocks of a page share their names, from the first to the last.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OTHERS = re.compile("show|dfss|gpt|listops|lra|side_by_side|mistral|video|ten_minutes")  # shared, or with own tests
EXAMPLES = sorted(p for p in (ROOT / "examples").glob("*.py") if not OTHERS.search(p.stem))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n*```text\n(?P<output>.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def need_libraries(text: str) -> None:
    """Skip the test where what the code imports is not installed."""
    for library in ("torch", "jax"):
        if f"import {library}" in text:
            pytest.importorskip(library)


def keep_dots(got: str, wanted: str) -> str:
    """``got``, with the lines of ``wanted`` that leave something open kept so."""
    open_lines = [line for line in wanted.splitlines() if "..." in line]
    kept = (next((o for o in open_lines if line.startswith(o.partition("...")[0])), line) for line in got.splitlines())
    return "".join(f"{line}\n" for line in kept)


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_example(path, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    need_libraries(path.read_text())
    monkeypatch.setattr(sys, "argv", [str(path), "--out", str(tmp_path)])
    monkeypatch.syspath_prepend(str(path.parent))
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert "tiles " in printed and "error " in printed
    assert (tmp_path / f"{path.stem}.png").stat().st_size > 500


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("example", ["mistral", "video", "ten_minutes"])
def test_models_side_by_side(example, tmp_path, monkeypatch):
    """Tiny ones; what we compute is what the others do, and the table says so."""
    for library in ("torch",) if example == "video" else ("torch", "transformers"):
        pytest.importorskip(library)
    path = ROOT / "examples" / f"{example}.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--tiny"])
    monkeypatch.setenv("OUT_DIR", str(tmp_path))
    monkeypatch.syspath_prepend(str(path.parent))
    runpy.run_path(str(path), run_name="__main__")
    rows = json.loads((tmp_path / f"{example}.json").read_text())
    if example == "ten_minutes":  # untrained, the two models are as good
        assert abs(rows[0]["test loss"] - rows[1]["test loss"]) < 0.1
    else:
        compared = [row[key] for row in rows for key in row if key.startswith("to ")]
        assert len(compared) >= 2 and 0 < max(compared) < 1e-5
    assert all(row[key] > 0 for row in rows for key in row if key.endswith(", ms"))


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=name)
def test_page(page, tmp_path, monkeypatch, pytestconfig):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    need_libraries(text)
    names: dict[str, object] = {"__name__": "page"}
    new, end = [], 0
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start("code"))
        code = compile("\n" * line + block["code"], str(page), "exec")  # tracebacks name the line of the page
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        got, wanted = printed.getvalue(), block["output"]
        if wanted is None:
            assert not got, f"{name(page)}:{line}: the block prints something: add a ```text block after it"
        elif not doctest.OutputChecker().check_output(wanted, got, doctest.ELLIPSIS):
            assert pytestconfig.getoption("--update-golden"), f"{name(page)}:{line} prints\n{got}instead of\n{wanted}"
            new += [text[end : block.start("output")], keep_dots(got, wanted)]
            end = block.end("output")
    if new:
        page.write_text("".join([*new, text[end:]]))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links(page):
    """Every relative link and picture of a page exists."""
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), f"{name(page)}: {target} does not exist"


def test_every_pattern_has_a_line_and_a_picture():
    from splatc.patterns.text import NAMES

    page = (ROOT / "docs/patterns.md").read_text()
    missing = [one for one in NAMES if f"{one}(" not in page]
    assert not missing, f"docs/patterns.md says nothing of {missing}"
    used = set(re.findall(r"\]\((?:docs/)?img/(\w+\.png)", "".join(p.read_text() for p in PAGES)))
    assert used == {p.name for p in (ROOT / "docs/img").iterdir()}


SHELL = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs/cli.md").read_text(), re.MULTILINE | re.DOTALL)
MEASURING = ("bench", "tune")  # minutes, or a GPU: their own tests run them


@pytest.mark.parametrize("line", "".join(SHELL).splitlines())
def test_command(line, tmp_path, monkeypatch, capsys):
    """Every command of docs/cli.md runs; one that measures has all its options."""
    import typer

    from splatc.cli.main import app, run

    monkeypatch.chdir(tmp_path)
    name, *rest = shlex.split(line, comments=True)[1:]
    if name in MEASURING:
        typer.main.get_command(app).commands[name].make_context(name, rest)
    else:
        assert run([name, *rest]) == 0, capsys.readouterr().err
