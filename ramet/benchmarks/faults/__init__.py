"""Tests of what survives faults: simulated interleavings, invariants, killed processes."""
