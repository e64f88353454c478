"""The nano model: a small language model that adds up rows, alone or by delegation."""
