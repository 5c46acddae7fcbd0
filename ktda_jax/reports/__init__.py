"""The parts of `python -m ktda_jax.report`: what a workdir tells, what its model does on the tiles, the page."""
