"""The GPU benchmarks: masked attention against what one would use instead, side by side in one process.

cases     the masks, each as a pattern of splatc and as a FlexAttention mask_mod
shapes    sizes of a call and its random tensors
peers     the contestants: splatc, FlexAttention, SDPA, and other libraries where they are installed
clock     time on the device: CUDA graphs over several input sets, between events
check     a float64 reference on sampled rows, repeated runs bit by bit, memory
measure   one case at one shape: all contestants, checked and timed in interleaved rounds
backward  the same with gradients: backward passes, forward and backward, the kernels of one
gradients a float64 reference of gradients, of whole heads
products  sddmm and spmm against cuSPARSE and dense products, a script of its own
passes    the device time of each kernel of a call
host      what the CPU side costs: calls, compilation, new lengths, new processes
suites    which cases at which shapes
warm      what the suites compile, compiled beforehand by processes beside each other
run       the suites in order, within a time budget
results   the figures as JSON, saved as they come, merged
targets   stated targets against the figures
tables    the figures as tables, and what limits each; backward_tables: those of gradients; cells: what they share
plot      the figures as a picture
"""
