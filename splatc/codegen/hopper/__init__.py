"""The fused attention forward for Hopper (sm_90a): TMA loads, wgmma products, one producer warp and 1-3 warpgroups of
consumers. float32 is computed in tf32.

    shape.py      sizes: tile, ring stages, shared memory, registers
    emit.py       words for emitting TIRx: branches, loops, mutable scalars
    ring.py       circular buffers in shared memory behind full / empty mbarriers
    copies.py     tensor maps and bulk copies
    products.py   wgmma: scores Q K^T from shared memory, outputs P V with P in registers
    softmax.py    online softmax and masks on the score registers
    epilogue.py   normalise, merge with what is there, store O by TMA and LSE
    producer.py   one thread that feeds the rings; gathering.py: a warpgroup that copies listed keys, turning.py: one
                  that turns V over for tf32
    queue.py      which row tile comes next: a dynamic queue over (batch, head, item)
    forward.py    the kernel: a producer and consumers made of these parts
    combine.py    the second kernel: partial results of split rows into one
"""
