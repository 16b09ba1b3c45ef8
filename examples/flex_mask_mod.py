"""A FlexAttention mask_mod, taken as it is. splatc evaluates it once and finds the structure by itself.

Here: causal, with a sink of 4 keys and a window that looks at every second key. The tensors are torch's.
"""

import torch
from show import check, draw

import splatc
from splatc import patterns as P

SEQ = 512


def mask_mod(b, h, q_idx, kv_idx):
    near = (q_idx - kv_idx <= 128) & ((q_idx - kv_idx) % 2 == 0)
    return (q_idx >= kv_idx) & (near | (kv_idx < 4))


torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, SEQ, 64) for _ in range(3))
o = splatc.attention(q, k, v, mask_mod)

attend = splatc.compile(mask_mod, seq_len=SEQ, head_dim=64, dtype=torch.float32, target="cpu")
print(attend.explain())

symbolic = P.causal() & (P.sink(4) | P.dilated(128, 0, 2))
assert splatc.analyze(mask_mod, SEQ) == splatc.analyze(symbolic, SEQ)  # the same mask, however it was written
check(o, q, k, v, symbolic.dense(SEQ))
draw(mask_mod, SEQ)
