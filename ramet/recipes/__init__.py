"""Whole experiments, each made by one command."""
