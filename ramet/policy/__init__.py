"""The policy, one set of weights: engines that sample from it, models that are loaded and saved, trainers that update it."""
