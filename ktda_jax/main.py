"""The user's entry: `python -m ktda_jax.main --config=configs/grass.py [--config.KEY=VALUE ...]`."""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "Path of the config, such as configs/grass.py:tiny.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where to write; default runs/<config name>.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train (or resume) and evaluate, or only evaluate.")
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, for several processes; 'auto' on TPU pods and under Slurm."
)
PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes there are.")
PROCESS = flags.DEFINE_integer("process_id", None, "With --coordinator: which one this is, from 0.")


def _workdir() -> str:
    if WORKDIR.value:
        return WORKDIR.value
    path, _, argument = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    return "/".join(("runs", "_".join(filter(None, (pathlib.Path(path).stem, argument.replace(",", "_"))))))


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; settings are given as --config.KEY=VALUE")
    if CONFIG.value is None:
        raise app.UsageError("give a config: --config=configs/grass.py")
    import jax  # after the flags, so that --help and their errors are quick

    if COORDINATOR.value == "auto":
        jax.distributed.initialize()
    elif COORDINATOR.value:
        jax.distributed.initialize(COORDINATOR.value, PROCESSES.value, PROCESS.value)

    from ktda_jax import train
    from ktda_jax.config import ConfigError
    from ktda_jax.data.sources import DataError

    logging.set_verbosity(logging.WARNING)
    verbs = {"train": train.train_and_evaluate, "eval": train.evaluate_workdir}
    try:
        verbs[MODE.value](CONFIG.value, _workdir())
    except (ConfigError, DataError, train.TrainingError) as error:
        sys.exit(f"error: {error}")


def run() -> None:
    """`app.run`, with a mistyped setting or an unknown config as one line instead of a stack."""
    try:
        app.run(main)
    except (AttributeError, KeyError, FileNotFoundError, TypeError, ValueError) as error:
        if flags.FLAGS.is_parsed():
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()
