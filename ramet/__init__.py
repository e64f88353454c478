"""ramet: a language model that learns to delegate to clones of itself under one budget."""

__version__ = "0.1.0"
