"""Sequence-parallel attention: Spava, and the exact and approximate methods that it is compared with."""
