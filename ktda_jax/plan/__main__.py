"""`python -m ktda_jax.plan --config=... --topology=v5e:4x4`: does the training step fit on a TPU slice?

Compiles the real step for the slice without having it (libtpu from `pip install -e '.[tpu]'`), prints what one chip
holds, and estimates the time of a step there and on other slices (`slices.py` says how, and what that leaves
out). With --search, settings are tried until one fits. Two cores need minutes for each compilation of the base model.
"""

import sys

from absl import flags

from ktda_jax import cli

if __name__ == "__main__":  # flags are one namespace for all that is imported, and other verbs have the same ones
    cli.define_config()
    flags.DEFINE_string("topology", "v5e:2x2", "KIND:SHAPE of the slice to compile for.")
    flags.DEFINE_integer("batch", None, "Global batch; default config.batch_size.", lower_bound=1)
    flags.DEFINE_bool("search", False, "Where the step does not fit, try settings that need less memory.")
    flags.DEFINE_string("output", None, "JSON file of the figures.")
    PARSE = cli.parsed(cli.parse_config)  # before the imports below, which take seconds

import shlex
import time
from importlib import metadata

from ktda_jax.config import checks
from ktda_jax.config.workdir import write_json
from ktda_jax.plan import compile, slices


def main(_: list[str]) -> None:
    import jax  # after `compile`, which says how libtpu is to behave

    jax.config.update("jax_platforms", "cpu")  # a GPU of this machine must not decide what is compiled for another
    cli.start()
    config, given = cli.config(), flags.FLAGS
    try:
        output = checks.check_output(given.output, "output")
        with config.unlocked():
            if given.batch:
                config.batch_size = given.batch
            config.eval_batch_size = config.batch_size  # evaluation is not planned; let it divide by the devices
            report = (compile.search if given.search else compile.compile_for)(config, given.topology)
    except compile.TooLarge as error:
        advice = "take a larger slice or a smaller batch" if given.search else "--search tries settings that need less"
        sys.exit(f"{given.topology}, global batch {config.batch_size}: {error}; {advice}")
    print(compile.text_of(report))
    if output:
        versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "libtpu")}
        report |= {"scaling": slices.scaling(report), "smallest": slices.smallest(report), "versions": versions}
        report |= {
            "date": time.strftime("%Y-%m-%d"),
            "command": shlex.join(["python", "-m", "ktda_jax.plan", *sys.argv[1:]]),
        }
        write_json(output, report)


if __name__ == "__main__":
    cli.run(main, PARSE)
