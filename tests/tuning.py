"""What the tests of tuning share. What is remembered goes to the file of the fixture ``tuned_file``."""

from __future__ import annotations

from splatc import patterns as P
from splatc.codegen.kernel import kernel_spec
from splatc.codegen.target import Target
from splatc.runtime.tuned import Found, tuned_tiles

HOPPER = Target("cuda", "sm_90a")
SPEC = kernel_spec(64, None, "bfloat16", HOPPER)
MASK = P.causal() & P.window(64, 0)
BEST = Found((64, 128), "NVIDIA H200", 12.3456)


def found(pattern=MASK, q_len=512, kv_len=512, spec=SPEC):
    return tuned_tiles(pattern, q_len, kv_len, spec)
