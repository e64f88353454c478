"""From a settings file to a run: settings, build, train, evaluate, sweep, cluster, reward models."""
