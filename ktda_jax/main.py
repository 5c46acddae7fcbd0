"""The user's entry: `python -m ktda_jax.main --config=configs/grass.py [--config.KEY=VALUE ...]`."""

import pathlib
import re
import sys

from absl import flags
from ml_collections import config_flags

from ktda_jax import cli
from ktda_jax.data.paths import place

cli.define_config()
cli.define_processes()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "A folder, or gs://BUCKET/FOLDER, to write to; default runs/<config name>."
)
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train (or resume) and evaluate, or only evaluate.")
EXTEND = flags.DEFINE_bool("extend", False, "Go on with another config.total_steps or config.batch_size than before.")
PROFILE = flags.DEFINE_string("profile", None, "START:STOP, the steps whose profiler trace is left in WORKDIR/profile.")


def _workdir() -> str:
    if WORKDIR.value:
        return WORKDIR.value
    path, _, argument = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    return "/".join(("runs", "_".join(filter(None, (pathlib.Path(path).stem, argument.replace(",", "_"))))))


def _profile() -> tuple[int, int] | None:
    if PROFILE.value is None:
        return None
    total, match = cli.config().total_steps, re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18})", PROFILE.value)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last <= total:
        sys.exit(f"error: --profile={PROFILE.value}: give START:STOP, steps from 1 to config.total_steps={total}")
    return first, last


def parse(argv: list[str]) -> list[str]:
    rest = cli.parse_config(argv)
    if "://" in (WORKDIR.value or "").removeprefix("gs://"):  # pathlib would make a local folder of that name
        sys.exit(f"error: --workdir={WORKDIR.value} is neither a path nor gs://BUCKET/FOLDER")
    if EXTEND.value and MODE.value == "eval":
        sys.exit("error: --extend is for training; leave it out with --mode=eval")
    if PROFILE.value is not None and MODE.value == "eval":
        sys.exit("error: --profile is for training; leave it out with --mode=eval")
    _profile()
    return rest


def main(_: list[str]) -> None:
    place(_workdir())  # a bucket that is not there is said before JAX is imported, which takes seconds
    cli.start()
    from ktda_jax.training import loop
    from ktda_jax.training.stop import StopSignal

    cli.stop_cleanly()
    stop = StopSignal()
    with cli.failing_alone():
        if MODE.value == "eval":
            loop.evaluate_workdir(cli.config(), _workdir())
        else:
            loop.train_and_evaluate(cli.config(), _workdir(), extend=EXTEND.value, stop=stop, profile=_profile())
    if stop.number:
        status = cli.given("stopped_status")
        sys.exit(128 + stop.number if status is None else status)


if __name__ == "__main__":
    cli.run(main, cli.parsed(parse))
