"""Benchmarks: measured on this machine, side by side with what one would use instead, against stated targets."""
