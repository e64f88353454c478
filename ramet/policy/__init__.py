"""Sampling and learning with one set of weights."""
