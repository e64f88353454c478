"""The version of this package, which records and models name."""

__version__ = "0.1.0"
