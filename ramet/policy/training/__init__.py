"""Training: rewards to advantages, trees to rows, rows to updates."""
