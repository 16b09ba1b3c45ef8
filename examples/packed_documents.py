"""Documents packed one after the other, with lengths that change at every step, and no recompilation.

The kernel knows nothing of the mask: a new layout of documents is a new table, and nothing is compiled for it.
"""

import time

import numpy as np
from show import check, draw, tensors

import splatc
from splatc import patterns as P

SEQ = 1024
rng = np.random.default_rng(0)
q, k, v = tensors(heads=2, seq_len=SEQ)
kernels = set()

for step in range(4):
    cuts = np.sort(rng.choice(np.arange(1, SEQ), size=5 + step, replace=False))
    pattern = P.documents(cu_seqlens=[0, *cuts, SEQ]) & P.causal()
    start = time.perf_counter()
    attend = splatc.compile(pattern, seq_len=SEQ, head_dim=64, dtype="float32", target="cpu")
    seconds = time.perf_counter() - start
    note = " (and the kernel, found or built)" if step == 0 else ""
    print(f"step {step}       {len(cuts) + 1} documents, planned in {seconds * 1e3:.1f} ms{note}")
    check(attend(q, k, v), q, k, v, pattern.dense(SEQ))
    kernels.add(attend.kernel.folder)

assert len(kernels) == 1  # the same binary each time
print(attend.explain())
draw(pattern, SEQ)
