"""Model definitions: plain Flax NNX modules, NHWC."""
