"""Scores of maps, from arrays alone: what they are, not what they are of."""
