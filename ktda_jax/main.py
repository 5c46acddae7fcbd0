"""The user's entry: `python -m ktda_jax.main --config=configs/grass.py [--config.KEY=VALUE ...]`."""

import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from ktda_jax import cli

cli.define_config()
cli.define_processes()
WORKDIR = flags.DEFINE_string("workdir", None, "Where to write; default runs/<config name>.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train (or resume) and evaluate, or only evaluate.")
EXTEND = flags.DEFINE_bool("extend", False, "Go on with another config.total_steps or config.batch_size than before.")
STOPPED_STATUS = flags.DEFINE_integer(
    "stopped_status",
    None,
    "Exit status if a signal stopped it before its end; default 130 for ctrl-c, 143 for SIGTERM.",
)

FAILED_SECONDS = 5  # that a process which failed waits for the others


def _workdir() -> str:
    if WORKDIR.value:
        return WORKDIR.value
    path, _, argument = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    return "/".join(("runs", "_".join(filter(None, (pathlib.Path(path).stem, argument.replace(",", "_"))))))


def parse(argv: list[str]) -> list[str]:
    rest = cli.parse_config(argv)
    if "://" in (WORKDIR.value or ""):  # pathlib would make a local folder of that name
        sys.exit(f"error: --workdir={WORKDIR.value} is not a path; mount it and give the folder")
    if EXTEND.value and MODE.value == "eval":
        sys.exit("error: --extend is for training; leave it out with --mode=eval")
    return rest


def main(_: list[str]) -> None:
    cli.start()
    from ktda_jax.training import loop
    from ktda_jax.training.stop import StopSignal

    cli.stop_cleanly()
    stop = StopSignal()
    try:
        if MODE.value == "eval":
            loop.evaluate_workdir(cli.config(), _workdir())
        else:
            loop.train_and_evaluate(cli.config(), _workdir(), extend=EXTEND.value, stop=stop)
    except Exception:
        if cli.given("coordinator"):
            # JAX waits at exit for the others, minutes, while they wait for this one; unless all fail alike.
            cli.end_after(FAILED_SECONDS)
        raise
    if stop.number:
        sys.exit(128 + stop.number if STOPPED_STATUS.value is None else STOPPED_STATUS.value)


if __name__ == "__main__":
    cli.run(main, cli.parsed(parse))
