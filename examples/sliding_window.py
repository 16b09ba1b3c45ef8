"""A causal sliding window (Mistral, Longformer): a query attends to itself and the 63 keys before it.

Two pieces, at any length: the triangle at the start, where the window is cut by the border, and the band.
"""

from show import check, draw, tensors

import splatc
from splatc import patterns as P

SEQ = 1024
pattern = P.causal() & P.window(63, 0)

attend = splatc.compile(pattern, seq_len=SEQ, head_dim=64, dtype="float32", target="cpu")
q, k, v = tensors(heads=2, seq_len=SEQ)
o = attend(q, k, v)

print(attend.explain())
for piece in splatc.analyze(pattern, SEQ).pieces:
    print(f"piece        {piece}")
check(o, q, k, v, pattern.dense(SEQ))
draw(pattern, SEQ)
