"""Weights of other projects: one table per source format. torch is imported only here, and lazily."""
