"""TFDS builders, one folder each: `tfds build` in the folder, or `ktda_jax.data.tfds_source.prepare`.

The packages stay empty: importing a builder imports TFDS and registers its name, which must happen only once.
"""
