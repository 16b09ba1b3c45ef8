"""The three kernels over values in ACSR order for Hopper (sm_90a): sddmm.py, softmax.py, spmm.py.

Values of 16-bit types are moved as uint16, pairs of them as uint32, so that the two types differ in conversions only.
"""
