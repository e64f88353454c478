"""Reading mathematical answers, and comparing them in value and form."""
