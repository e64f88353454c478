"""Whole experiments, each run by one command."""
