"""examples/dfss.py with tiny sizes: every kind of attention is trained, and the same seed gives the same figures."""

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from splatc.sparsify import to_nm  # noqa: E402


@pytest.mark.usefixtures("one_thread")
def test_recipe(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    dfss = importlib.import_module("dfss")
    monkeypatch.setattr(sys, "argv", ["dfss.py", "--steps", "10", "--tuning", "5", "--tests", "100"])
    swaps = []
    monkeypatch.setattr(dfss, "to_nm", lambda model, *ratio: swaps.append((to_nm(model, *ratio), ratio)))
    found = dfss.main()
    assert list(found) == ["dense", "2:4", "1:2"] and all(0 <= one <= 1 for both in found.values() for one in both)
    assert [(str(model.layer.self_attn.pattern), ratio) for model, ratio in swaps] == [
        ("nm(2, 4)", (2, 4)), ("nm(1, 2)", (1, 2)),
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "after 5 more steps" in printed and f"{100 * found['2:4'][1]:.1f} %" in printed and "seed 0" in printed
    assert dfss.main() == found
