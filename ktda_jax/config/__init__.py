"""What a config file means: settings, checked and held against each other, the model they ask for, a workdir's record.

Nothing here imports JAX but `model`, so that a setting that cannot work is named at once.
"""
