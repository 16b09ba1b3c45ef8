"""The three kernels of DFSS: scores pruned as they are computed, 2:4 or 1:2, softmax of what is kept, sparse product.

Values are row-major, as ``splatc.formats.nm.encode`` has them, metadata in the order of ``to_registers`` there.
"""
