"""examples/dfss.py with tiny sizes: every kind of attention is trained, and the same seed gives the same figures."""

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")


def test_recipe(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    dfss = importlib.import_module("dfss")
    monkeypatch.setattr(sys, "argv", ["dfss.py", "--steps", "30", "--tuning", "5", "--tests", "200"])
    found = dfss.main()
    assert list(found) == ["dense", "2:4", "1:2"] and all(0 <= one <= 1 for both in found.values() for one in both)
    assert len({both for both in found.values()}) == 3  # the kinds differ
    printed = capsys.readouterr().out
    assert "after 5 more steps" in printed and f"{100 * found['2:4'][1]:.1f} %" in printed and "seed 0" in printed
    assert dfss.main() == found
