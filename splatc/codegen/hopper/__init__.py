"""The fused attention forward for Hopper (sm_90a): TMA loads, wgmma products, a producer and 1-3 consumers.

The kernel is put together in forward.py; what each file holds: docs/architecture.md.
"""
