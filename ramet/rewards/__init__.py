"""Scores for answers, penalties for the cost of a tree, and reward models."""
