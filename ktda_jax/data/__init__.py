"""Files to tiles, checked, augmented, in batches of numpy arrays. Knows no model and no training."""
