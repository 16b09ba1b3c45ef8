"""Longformer: a window on both sides, and a few global tokens that see everything and are seen by all."""

from show import check, draw, tensors

import splatc
from splatc import patterns as P

SEQ = 1024
pattern = P.longformer(window=64, global_tokens=8)
assert (pattern.dense(200) == (P.window(64, 64) | P.global_rows(8) | P.global_cols(8)).dense(200)).all()

attend = splatc.compile(pattern, seq_len=SEQ, head_dim=64, dtype="float32", target="cpu")
q, k, v = tensors(heads=2, seq_len=SEQ)
o = attend(q, k, v)

print(attend.explain())
check(o, q, k, v, pattern.dense(SEQ))
draw(pattern, SEQ)
