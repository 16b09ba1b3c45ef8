"""Keys that are padding, others in each batch entry, where a mask is the same for all.

What differs comes with the tensors: q and k get a few more coordinates, in which a key is 0 unless it is padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

from splatc.errors import InvalidInput, Unsupported

COORDINATES = 8  # head dims stay multiples of 8, for tensor cores
OF_QUERIES = 2.0**15  # in float16 too. It is large, as |K| must not be: gradients of Q are summed in steps of it
FAR = COORDINATES * OF_QUERIES  # how much lower scores of padding are
MAX_HEAD_DIM = 256 - COORDINATES
SCALES = 2.0**-13, 2.0**13  # of which 1/scale is a number of float16


def check_padding(padding: Any, batch: int, kv_len: int) -> None:
    """InvalidInput unless this is a key_padding_mask for so many keys: bool (batch, kv_len)."""
    is_tensor = isinstance(padding, torch.Tensor)
    if not is_tensor or padding.dtype != torch.bool or padding.shape != (batch, kv_len):
        what = f"{padding.dtype} {tuple(padding.shape)}" if is_tensor else type(padding).__name__
        raise InvalidInput(f"key_padding_mask is {what}: it must be bool ({batch}, {kv_len}), True where a key is "
                           "padding")  # fmt: skip


def hide(q: torch.Tensor, k: torch.Tensor, padding: torch.Tensor, scale: float,
         layout: str) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(q, k) with ``COORDINATES`` more, by which scores of padding are lower by ``FAR`` and others what they were.

    padding: bool (batch, kv_len). scale: of the scores, to be passed on, as the default is another for what comes out.
    Raises InvalidInput for another mask; Unsupported for a head dim or a scale that leaves no room.
    """
    check_padding(padding, k.shape[0], k.shape[2 if layout == "bhsd" else 1])
    if q.shape[-1] > MAX_HEAD_DIM:
        raise Unsupported(f"head_dim is {q.shape[-1]}: with key_padding_mask it must be at most {MAX_HEAD_DIM}")
    if not SCALES[0] <= abs(scale) <= SCALES[1]:
        raise Unsupported(f"scale is {scale}: with key_padding_mask it must be from 2**-13 to 2**13, so multiply q "
                          "instead")  # fmt: skip
    where = padding[:, None, :, None] if layout == "bhsd" else padding[:, :, None, None]
    low = torch.where(where, -1 / scale, 0.0).to(k.dtype)
    return pad(q, (0, COORDINATES), value=OF_QUERIES), torch.cat([k, low.expand(*k.shape[:3], COORDINATES)], -1)


def reveal(o: torch.Tensor, lse: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) of what `hide` gave: 0 and -inf for queries that were left with padding alone."""
    alone = lse < -FAR / 2
    rows = alone if layout == "bhsd" else alone.transpose(1, 2)
    return o.masked_fill(rows[..., None], 0), lse.masked_fill(alone, -torch.inf)
