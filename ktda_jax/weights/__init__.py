"""Weights outside of training: our folder, other projects' files under our paths, and what a config asks for."""
