"""Mathematical answers: read, and compared in value and form."""
