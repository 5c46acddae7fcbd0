"""A trained model at work: `segmenter` in Python, whole scenes to maps on disk, and their scores."""
