"""Tools that come with ramet, and those of others: none is held by a runtime unless it is given to it."""
