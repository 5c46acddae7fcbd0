"""Data sets, augmentation and input pipelines (numpy only, no jax)."""
