"""Gradients of the fused attention for Hopper (sm_90a): kernels over columns of keys and rows of queries, and passes.

Put together in kernels.py, which also has the formulas; what each file holds: docs/architecture.md.
"""
