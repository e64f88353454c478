"""Measuring: baselines, sweeps, statistics, pictures, and the jobs of the command line."""
