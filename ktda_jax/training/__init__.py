"""From settings and tiles to a workdir: the program, the loop, checkpoints, what is written on the way."""
