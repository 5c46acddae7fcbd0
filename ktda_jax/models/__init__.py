"""The networks as plain Flax NNX modules, NHWC. Knows nothing of data, training, sharding or checkpoints."""
