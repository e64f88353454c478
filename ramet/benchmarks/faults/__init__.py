"""Robustness under faults: simulated interleavings, invariants, killed processes."""
