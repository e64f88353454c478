"""Measuring: how good (`evaluation`), how fast (`speed`), what survives (`faults`)."""
