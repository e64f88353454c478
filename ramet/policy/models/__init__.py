"""Models on disk: the catalogue, loading, LoRA adapters, checkpoints."""
