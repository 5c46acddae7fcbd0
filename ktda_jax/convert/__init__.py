"""Weights of other projects, to our paths and back: `sources` for all, and one file for each kind of naming."""
