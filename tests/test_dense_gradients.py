"""The reference of the GPU's gradient tests is the oracle."""

from typing import Any

import numpy as np
import pytest

from splatc import oracle
from splatc import patterns as P
from splatc.oracle import relative_error

torch = pytest.importorskip("torch")

from tests.dense_gradients import dense_gradients  # noqa: E402  (it imports torch)

PATTERN = P.causal("bottom_right") & ~P.global_rows(3) & ~P.global_cols(20)
OPTIONS: list[dict[str, Any]] = [{}, {"scale": 0.7}, {"scale": -0.2, "softcap": 1.5}]


def draw(q_len: int, kv_len: int, heads: int = 4, kv_heads: int = 2) -> Any:
    """q, k, v, do, dlse."""
    shapes = (heads, q_len, 8), (kv_heads, kv_len, 8), (kv_heads, kv_len, 5), (heads, q_len, 5), (heads, q_len)
    return [torch.randn(2, *shape) for shape in shapes]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_the_oracle(options):
    q, k, v, do, dlse = draw(40, 60)
    mask = PATTERN.dense(40, 60)
    found = dense_gradients(q, k, v, torch.from_numpy(mask), do, dlse, **options)
    q, k, v, do, dlse = (x.double().numpy() for x in (q, k, v, do, dlse))
    o, lse = oracle.attention(q, k, v, mask, **options)
    np.testing.assert_allclose(found.lse, lse)
    wanted = oracle.gradients(q, k, v, mask, do, dlse, **options)
    for x, y in zip((found.o, *found.gradients), (o, *wanted)):
        assert relative_error(x.numpy(), y) < 1e-12
    for x, z in zip(found.gradients, found.magnitudes):
        assert x.shape == z.shape and (x.abs() <= z * (1 + 1e-9)).all()


def test_errors():
    q, k, v, do, _ = draw(40, 40, 2, 2)
    found = dense_gradients(q, k, v, torch.from_numpy(P.causal().dense(40)), do)
    assert all(x == 0 for x in found.errors(found.gradients).values())
    worse = [1.02 * x for x in found.gradients]
    assert all(x == pytest.approx(0.02) for x in found.errors(worse).values())
    for name, rows in found.row_errors(worse).items():
        assert rows.shape == (2, 2, 40) and (rows[:, :, 1:] < 0.0201).all(), name
    broken = [x.clone() for x in found.gradients]
    broken[1][0, 1, 3, 2] = float("nan")
    assert [np.isnan(x) for x in found.errors(broken).values()] == [False, True, False]
    assert found.row_errors(broken)["dk"].isnan().sum() == 1


def test_errors_of_what_cancels_are_relative_to_what_was_added():
    """One key: dq = 0, and what rounding leaves is small against the two terms."""
    q, k, v, do, _ = draw(1, 1, 1, 1)
    found = dense_gradients(q, k, v, torch.ones(1, 1, dtype=torch.bool), do)
    dq, dk, dv = found.gradients
    left = dq + 1e-3 * found.magnitudes[0]
    assert found.errors((left, dk, dv))["dq"] == pytest.approx(1e-3)
    assert (found.row_errors((left, dk, dv))["dq"] - 1e-3).abs().max() < 1e-12
    empty = dense_gradients(q, k, v, torch.zeros(1, 1, dtype=torch.bool), do)
    assert all((x == 0).all() for x in (*empty.gradients, *empty.magnitudes))
    assert empty.errors((dq + 1, dk * 0, dv * 0))["dq"] > 1 and empty.row_errors((dq + 1, dk, dv))["dq"].min() > 1
