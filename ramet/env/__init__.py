"""Tasks, how they read to the model, and how an answer is graded."""
