"""Methods, baselines, harness and statistics: they receive objects that are already built, and read no settings file."""
