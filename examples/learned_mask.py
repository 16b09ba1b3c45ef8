"""A learned mask: a window on both sides, and for each of the last 128 queries the 24 keys that score best.

A boolean matrix is all that the compiler sees. What is regular becomes affine pieces, the rest becomes blocks of bits
(the "remainder"): any mask compiles, a regular one compiles to something faster.
"""

import numpy as np
from show import check, draw, tensors

import splatc
from splatc import patterns as P

SEQ, LEARNED, BEST = 512, 128, 24
rng = np.random.default_rng(0)
scores = rng.standard_normal((LEARNED, SEQ))  # as if a small network had made them
mask = P.window(20, 20).dense(SEQ)
np.put_along_axis(mask[-LEARNED:], np.argpartition(scores, -BEST)[:, -BEST:], True, axis=1)

attend = splatc.compile(mask, head_dim=64, dtype="float32", target="cpu")  # the lengths are the matrix's
q, k, v = tensors(heads=2, seq_len=SEQ)
o = attend(q, k, v)

print(attend.explain())
acsr = splatc.analyze(mask)
assert (acsr.to_dense() == mask).all()
print(f"memory       {acsr.nbytes} bytes, as a matrix {mask.nbytes}")
check(o, q, k, v, mask)
draw(mask, SEQ)
