"""The three kernels of DFSS: scores pruned 2:4 as they are computed, softmax of the kept ones, their sparse product.

Values are row-major, as ``splatc.formats.nm.encode`` has them, metadata in the order of ``to_registers`` there.
"""
