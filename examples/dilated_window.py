"""A dilated window (Longformer): every fourth key within 128 positions on both sides.

In sequence order every 64 x 64 tile inside the band is a quarter full. Seen by residue class modulo 4 the mask is an
ordinary band of dense tiles: compare "waste" with that of the plan without views. (Where a band is as narrow as here,
the half-filled tiles at its two edges remain; a wider one wastes less.)
"""

from show import check, draw, tensors

import splatc
from splatc import patterns as P
from splatc.ir.passes import Schedule, lower, run_passes

SEQ = 1024
pattern = P.dilated(128, 128, 4)

attend = splatc.compile(pattern, seq_len=SEQ, head_dim=64, dtype="float32", target="cpu")
q, k, v = tensors(heads=2, seq_len=SEQ)
o = attend(q, k, v)

print(attend.explain())
acsr = splatc.analyze(pattern, SEQ)
((_, plain),) = run_passes(lower(acsr), Schedule(views=False)).domains
print(f"no views     {plain.tiles} tiles, waste {plain.tile_area / acsr.nnz:.3f}")
check(o, q, k, v, pattern.dense(SEQ))
draw(pattern, SEQ)
