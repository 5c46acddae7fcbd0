"""Ours against the published method in PyTorch. model and worker import neither JAX nor ktda_jax."""
