"""Methods, baselines, harness and statistics: handed built things, they know no settings file."""
