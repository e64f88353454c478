"""The nano model: a small language model that adds up rows, alone or by delegation."""

from __future__ import annotations

from pathlib import Path

BASE = Path(__file__).parent / "base"
"""The shipped weights: a Hugging Face model directory."""
