"""The fixed Sparse Transformer: a query attends to its own block of 128, and to the last 16 keys of all blocks before.

One pass over the rows, two views of the keys: the blocks in sequence order, and the summary keys gathered from four
blocks into one dense tile of 64.
"""

from show import check, draw, tensors

import splatc
from splatc import patterns as P

SEQ = 2048
pattern = P.causal() & P.fixed(128, 16)

attend = splatc.compile(pattern, seq_len=SEQ, head_dim=64, dtype="float32", target="cpu")
q, k, v = tensors(heads=1, seq_len=SEQ)
o = attend(q, k, v)

print(attend.explain())
check(o, q, k, v, pattern.dense(SEQ))
draw(pattern, SEQ)
