"""Gradients of the fused attention for Hopper (sm_90a): one kernel over columns of keys, and three over rows.

Put together in kernels.py, which also has the formulas; what each file holds: docs/architecture.md.
"""
