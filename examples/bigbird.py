"""BigBird, with another seed for each head: a window of blocks, global blocks, random blocks.

A list of patterns means one for each head. The heads run in one launch of one kernel.
"""

import numpy as np
from show import check, draw, tensors

import splatc
from splatc import patterns as P

SEQ, HEADS = 1024, 4
heads = [P.bigbird(block=64, window=3, global_blocks=1, random=2, seed=h) for h in range(HEADS)]

attend = splatc.compile(heads, seq_len=SEQ, head_dim=64, dtype="float32", target="cpu")
q, k, v = tensors(HEADS, SEQ)
o = attend(q, k, v)

explanation = attend.explain()
print(f"tiles        {explanation.tiles} for {HEADS} heads, waste {explanation.waste:.3f}")
check(o, q, k, v, np.stack([head.dense(SEQ) for head in heads]))
draw(heads, SEQ)
