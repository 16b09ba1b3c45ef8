"""The strided Sparse Transformer: a local window and every 64th key before it.

The two parts want different orders of the rows. The window is computed in sequence order, the stride by residue class;
the second pass starts from the output and the log-sum-exp (LSE) of the first, so the result is that of one softmax.
"""

from show import check, draw, tensors

import splatc
from splatc import patterns as P
from splatc.ir.printer import to_text

SEQ, STEP = 2048, 64
pattern = P.causal() & (P.window(STEP - 1, 0) | P.strided(STEP))

attend = splatc.compile(pattern, seq_len=SEQ, head_dim=64, dtype="float32", target="cpu")
q, k, v = tensors(heads=1, seq_len=SEQ)
o = attend(q, k, v)

explanation = attend.explain()
print(explanation)
assert explanation.passes == 2
(program,) = attend.plan().programs
print("\n".join(line for line in to_text(program).splitlines() if "attend(" in line))
check(o, q, k, v, pattern.dense(SEQ))
draw(pattern, SEQ)
