"""Pictures written to files: plots of numbers, and sheets of tiles. Knows nothing of models or training."""
