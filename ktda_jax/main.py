"""The user's entry: `python -m ktda_jax.main --config=configs/grass.py [--config.KEY=VALUE ...]`."""

import functools
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
    "stopped_status", 0, "Exit status if a signal stopped training before its end, for launchers that start it again."
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

    train = functools.partial(loop.train_and_evaluate, extend=EXTEND.value)
    verbs = {"train": train, "eval": loop.evaluate_workdir}
    try:
        result = verbs[MODE.value](cli.config(), _workdir())
    except Exception:
        if cli.given("coordinator"):
            # JAX waits at exit for the others, minutes, while they wait for this one; unless all fail alike.
            cli.end_after(FAILED_SECONDS)
        raise
    if result is None:
        sys.exit(STOPPED_STATUS.value)


if __name__ == "__main__":
    cli.run(main, cli.parsed(parse))
