"""The user's entry: `python -m ktda_jax.main --config=configs/grass.py [--config.KEY=VALUE ...]`."""

import logging as standard_logging
import os
import pathlib
import sys
import threading

from absl import app, flags, logging
from ml_collections import config_flags

from ktda_jax import config as configs
from ktda_jax.cli import parsed

CONFIG = config_flags.DEFINE_config_file("config", None, "Path of the config, such as configs/grass.py:tiny.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where to write; default runs/<config name>.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train (or resume) and evaluate, or only evaluate.")
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, for several processes; 'auto' on TPU pods and under Slurm."
)
PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes there are.")
PROCESS = flags.DEFINE_integer("process_id", None, "With --coordinator: which one this is, from 0.")
JOIN_TIMEOUT = flags.DEFINE_integer("join_timeout", 300, "With --coordinator: seconds to wait for all to start.", 1)
STOPPED_STATUS = flags.DEFINE_integer(
    "stopped_status", 0, "Exit status if a signal stopped training before its end, for launchers that start it again."
)

FAILED_SECONDS = 5  # that a process which failed waits for the others


def _workdir() -> str:
    if WORKDIR.value:
        return WORKDIR.value
    path, _, argument = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    return "/".join(("runs", "_".join(filter(None, (pathlib.Path(path).stem, argument.replace(",", "_"))))))


def parse(argv: list[str]) -> list[str]:
    """Parses the flags and loads the config; what is wrong with them becomes one line."""
    try:
        rest = flags.FLAGS(argv)
        if CONFIG.value is not None:
            CONFIG.value.keys()  # a file that could not be read is an error only once it is used
    except (AttributeError, KeyError) as error:
        sys.exit(f"error: {_unknown_setting(error, argv)}")
    except (flags.Error, OSError, TypeError, ValueError) as error:
        # The lines before the last are a stack, or the places looked at.
        sys.exit(f"error: {str(error).strip().splitlines()[-1].strip()}")
    if len(rest) > 1:
        sys.exit(f"error: unexpected argument {rest[1]!r}; settings are given as --config.KEY=VALUE")
    if CONFIG.value is None:
        sys.exit("error: give a config: --config=configs/grass.py")
    if COORDINATOR.value not in (None, "auto") and None in (PROCESSES.value, PROCESS.value):
        sys.exit("error: --coordinator=HOST:PORT needs --num_processes and --process_id too")
    if "://" in (WORKDIR.value or ""):  # pathlib would make a local folder of that name
        sys.exit(f"error: --workdir={WORKDIR.value} is not a path; mount it and give the folder")
    try:
        configs.check(CONFIG.value)
    except configs.ConfigError as error:
        sys.exit(f"error: {error}")
    return rest


def _unknown_setting(error: Exception, argv: list[str]) -> str:
    """ml_collections says only the last part of an unknown setting's name, and on a second line a similar one."""
    while isinstance(error.args[0], Exception):
        error = error.args[0]
    key, *hint = str(error.args[0]).splitlines()
    for argument in argv:
        name = argument.lstrip("-").partition("=")[0]
        if key.strip("'\"") in name.split("."):
            return f"{name} is not a setting" + (f". {hint[0]}" if hint else "; the config file lists them all")
    raise error  # not the command line's fault but the config file's


def _join(jax) -> None:
    """Waits for the other processes, then this one dies with them: JAX notices a dead one after 100 s at the latest."""
    address = None if COORDINATOR.value == "auto" else COORDINATOR.value

    # JAX's own timeout aborts the process with a C++ stack trace, so this one comes first.
    timer = _end_after(
        JOIN_TIMEOUT.value,
        f"error: not all processes met at --coordinator={COORDINATOR.value} within {JOIN_TIMEOUT.value} s; start "
        "all with the same host:port, let the port through firewalls, or give a longer --join_timeout\n",
    )
    jax.distributed.initialize(address, PROCESSES.value, PROCESS.value, initialization_timeout=JOIN_TIMEOUT.value + 60)
    timer.cancel()


def _end_after(seconds: int, message: str = "") -> threading.Timer:
    """Ends this process, wherever it waits, unless the timer is cancelled."""

    def end():
        sys.stderr.write(message)
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


def start() -> None:
    """Joins the other processes that the flags speak of, if any, and lets only warnings through to the terminal."""
    import jax  # after the flags, so that --help and their errors are quick

    logging.set_verbosity(logging.WARNING)
    handler = logging.get_absl_handler()
    handler.setFormatter(standard_logging.Formatter("%(levelname)s: %(message)s"))
    # Orbax warns about ordinary things, such as a checkpoint between two evaluations, which has no score.
    handler.addFilter(lambda record: record.levelno > standard_logging.WARNING or "orbax" not in record.pathname)
    if COORDINATOR.value:
        _join(jax)


def main(_: list[str]) -> None:
    start()
    from ktda_jax.data.images import DataError
    from ktda_jax.training import loop

    verbs = {"train": loop.train_and_evaluate, "eval": loop.evaluate_workdir}
    try:
        result = verbs[MODE.value](CONFIG.value, _workdir())
    except Exception as error:
        if COORDINATOR.value:
            # JAX waits at exit for the others, minutes, while they wait for this one; unless all fail alike.
            _end_after(FAILED_SECONDS)
        if isinstance(error, (configs.ConfigError, DataError, loop.TrainingError)):
            sys.exit(f"error: {error}")
        raise
    if result is None:
        sys.exit(STOPPED_STATUS.value)


def run() -> None:
    app.run(main, flags_parser=parsed(parse))


if __name__ == "__main__":
    run()
