"""The installed command `ktda VERB ...`, which is `python -m ktda_jax.VERB ...`; flags of verbs without a config."""

import glob
import importlib.util
import os
import runpy
import sys
from collections.abc import Callable

from absl import app, flags

VERBS = {
    "main": "train, resume, evaluate",
    "inspect": "look at the data before training",
    "extract": "compute the teacher's features once",
    "predict": "map images and whole scenes",
    "report": "a training as one HTML page",
    "export": "the model as one StableHLO or ONNX file",
    "convert": "weights from and to PyTorch",
    "benchmark": "time and memory of the training step and a forward pass",
    "plan": "does the training step fit on a TPU slice",
}


def parser(*required: str, hint: str = "all options are flags, see --help") -> Callable[[list[str]], list[str]]:
    """For app.run: what is wrong with the flags becomes one line; `hint` is for arguments that are none."""

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
        except flags.Error as error:  # the lines before the last are a stack
            sys.exit(f"error: {str(error).strip().splitlines()[-1].strip()}")
        if len(rest) > 1:
            sys.exit(f"error: unexpected argument {rest[1]!r}; {hint}")
        for name in required:
            if not flags.FLAGS[name].value:
                sys.exit(f"error: give --{name}; see --help")
        return rest

    return parse


def parsed(parse: Callable[[list[str]], list[str]]) -> Callable[[list[str]], list[str]]:
    """Parses the command line now, before a verb imports JAX, which takes seconds; gives what app.run parses with."""
    app.define_help_flags()
    rest = parse(sys.argv)
    quiet_libtpu()
    return lambda argv: rest


def quiet_libtpu() -> None:
    """libtpu without a TPU complains in eight lines: then JAX is not to try it. Call this before JAX is imported."""
    nodes = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia*", "/dev/kfd", "/dev/dxg", "/dev/dri/*")
    only_cpu = not any(map(glob.glob, nodes)) and not any(name.startswith("TPU_") for name in os.environ)
    if only_cpu and sys.platform == "linux" and importlib.util.find_spec("libtpu"):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def main() -> None:
    verb = sys.argv[1] if len(sys.argv) > 1 else None
    if verb in (None, "-h", "--help"):
        print("ktda VERB [--help] ..., where VERB is\n" + "\n".join(f"  {k:10} {v}" for k, v in VERBS.items()))
    elif verb not in VERBS:
        sys.exit(f"error: ktda knows no {verb!r}; it knows {', '.join(VERBS)}")
    else:
        sys.argv[:2] = [f"ktda {verb}"]
        runpy.run_module(f"ktda_jax.{verb}", run_name="__main__", alter_sys=True)
