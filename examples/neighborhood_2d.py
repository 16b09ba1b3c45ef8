"""Neighbourhood attention on an image of 32 x 32 patches: every patch sees the 7 x 7 patches round it.

Positions are numbered row by row, so the mask is a band of bands. The compiler finds the grid again in the pieces and
makes tiles that are patches of the image; neighbourhoods are cut at the border of the image, not shifted.
"""

from show import check, draw, tensors

import splatc
from splatc import patterns as P

HEIGHT = WIDTH = 32
pattern = P.neighborhood((HEIGHT, WIDTH), 7)
SEQ = HEIGHT * WIDTH

attend = splatc.compile(pattern, seq_len=SEQ, head_dim=64, dtype="float32", target="cpu")
q, k, v = tensors(heads=2, seq_len=SEQ)
o = attend(q, k, v)

print(attend.explain())
mask = pattern.dense(SEQ)
assert mask[0].sum() == 4 * 4 and mask[16 * WIDTH + 16].sum() == 7 * 7  # a corner, the middle
check(o, q, k, v, mask)
draw(pattern, SEQ)
