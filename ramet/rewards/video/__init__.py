"""Reward models for answers to questions about videos: their data, training, use and serving."""
