"""KTDA: fine-grained remote sensing segmentation in JAX."""
