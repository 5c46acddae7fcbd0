"""What a training step needs on machines that are not there: operations, memory, time on TPU slices."""
