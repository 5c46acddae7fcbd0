"""A trained model at work: `segmenter` in Python, and whole scenes to maps on disk."""
