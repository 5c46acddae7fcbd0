"""What the verbs' command lines share: flags, configs, other processes, errors and signals in one line; `ktda`.

JAX is imported by none of it until `start`, so that --help and errors of flags are quick.
"""

import contextlib
import functools
import glob
import importlib.util
import logging as standard_logging
import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from ktda_jax import UserError
from ktda_jax.config import checks
from ktda_jax.data.paths import expand
from ktda_jax.signals import Signals

VERBS = {
    "main": "train, resume, evaluate",
    "inspect": "look at the data before training",
    "extract": "compute the teacher's features once",
    "predict": "map images and whole scenes",
    "evaluate": "score a model on images or scenes with labels",
    "areas": "hectares per class of maps, also by polygons, and how sure they are",
    "report": "a training as one HTML page",
    "export": "the model as one StableHLO or ONNX file, or a folder for Hugging Face's hub",
    "convert": "weights from and to PyTorch",
    "benchmark": "time and memory of the training step and a forward pass",
    "plan": "does the training step fit on a TPU slice",
}


Parser = Callable[[list[str]], list[str]]  # the command line -> what is left of it, for app.run

FAILED_SECONDS = 5  # that a process which failed waits for the others

flags.DEFINE_bool("traceback", False, "Show where in the program an error was found, too.")


def define_config() -> None:
    config_flags.DEFINE_config_file("config", None, "Path of the config, such as configs/grass.py:tiny.")


def define_processes() -> None:
    flags.DEFINE_string(
        "coordinator", None, "host:port of process 0, for several processes; 'auto' on TPU pods and under Slurm."
    )
    flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes there are.")
    flags.DEFINE_integer("process_id", None, "With --coordinator: which one this is, from 0.")
    flags.DEFINE_integer("join_timeout", 300, "With --coordinator: seconds to wait for all to start.", 1)
    flags.DEFINE_integer(
        "stopped_status",
        None,
        "Exit status if a signal stopped it before its end; default 130 for ctrl-c, 143 for SIGTERM.",
    )


def define_heads() -> None:
    flags.DEFINE_integer("teacher_heads", None, "Attention heads of the teacher, where no file tells; by its width.")
    flags.DEFINE_integer("fmm_heads", None, "The same of the FMM; 8 as published.")


def define_mapping() -> None:
    """How images are read and mapped; for --help a verb adopts these flags."""
    flags.DEFINE_integer("tile", None, "Side of the tiles in pixels; by default the training crop's.")
    flags.DEFINE_integer("overlap", None, "Pixels that tiles overlap; by default a quarter of the tile.")
    flags.DEFINE_integer("batch_size", None, "Tiles at once; by default 4 on each accelerator, 1 on CPU.", 1)
    flags.DEFINE_list("bands", None, "Band numbers, from 1, in the order of training; by default as in training.")
    flags.DEFINE_list("scale", None, "LOW,HIGH, or one such pair per band: the values that become 0 and 255.")
    flags.DEFINE_float("nodata", None, "Value of pixels without data, beside what a file declares; else as trained.")
    flags.DEFINE_bool("probabilities", False, "NAME_probabilities.tif, a band per class; 254 is 1.")
    flags.DEFINE_bool("confidence", False, "NAME_confidence.tif: the probability of the mapped class.")
    flags.DEFINE_bool("overlay", False, "NAME_overlay.png: scene and classes, at most 2048 pixels a side.")
    flags.DEFINE_bool("tta", False, "Average over mirror images and two other scales; six times the work.")
    define_heads()


def numbers(name: str, kind: type) -> list | None:
    """The value of a flag that is a list of `kind`, int or float."""
    text = given(name)
    try:
        return None if text is None else [kind(value) for value in text]
    except ValueError:
        sys.exit(f"error: --{name}={','.join(text)} is not a list of {'whole ' * (kind is int)}numbers")


def given(name: str):
    """The value of a flag; None where the verb does not know it."""
    return flags.FLAGS[name].value if name in flags.FLAGS else None


def config() -> ConfigDict:
    return flags.FLAGS["config"].value


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
        _check_processes()
        return rest

    return parse


def parse_config(argv: list[str]) -> list[str]:
    """A `Parser` of verbs with a config: loads and checks it, too."""
    try:
        argv = [_at_home(argument) for argument in argv]
        rest = flags.FLAGS(argv)
        if config() is not None:
            config().keys()  # a file that could not be read is an error only once it is used
    except (AttributeError, KeyError) as error:
        sys.exit(f"error: {_unknown_setting(error, argv)}")
    except (flags.Error, OSError, TypeError, ValueError) as error:
        # The lines before the last are a stack, or the places looked at.
        sys.exit(f"error: {str(error).strip().splitlines()[-1].strip()}")
    if len(rest) > 1:
        sys.exit(f"error: unexpected argument {rest[1]!r}; settings are given as --config.KEY=VALUE")
    if config() is None:
        sys.exit("error: give a config: --config=configs/grass.py")
    _check_processes()
    in_one_line(checks.resolve, config())
    return rest


def _check_processes() -> None:
    count, index = given("num_processes"), given("process_id")
    if given("coordinator") not in (None, "auto") and None in (count, index):
        sys.exit("error: --coordinator=HOST:PORT needs --num_processes and --process_id too")
    if given("coordinator") is None and (count is None) != (index is None) and count != 1:
        sys.exit("error: --num_processes and --process_id go together; give both")
    if None not in (count, index) and not 0 <= index < count:
        sys.exit(f"error: --process_id={index} is not one of --num_processes={count}, which are counted from 0")


def _at_home(argument: str) -> str:
    """--config=~/FILE as the shell would have it; the file is opened by ml_collections."""
    flag, _, path = argument.partition("=")
    return f"{flag}={expand(path)}" if flag.lstrip("-") == "config" and path.startswith("~") else argument


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


def parsed(parse: Parser) -> Parser:
    """Parses the command line now, before a verb imports JAX, which takes seconds; gives what `run` parses with."""
    hear_signals()
    app.define_help_flags()
    rest = parse(sys.argv)
    quiet_libtpu()
    return lambda argv: rest


def run(main: Callable[[list[str]], None], parse: Parser) -> None:
    """Runs a verb: what a user can mend is shown in one line, with exit status 1."""
    app.run(functools.partial(in_one_line, main), flags_parser=parse)


def in_one_line(main, argv):
    """main(argv), or SystemExit with what a user can mend; the end of the process if a signal was to end it."""
    try:
        main(argv)
    except BaseException as error:
        if _signals.raised or isinstance(error, KeyboardInterrupt):  # whatever became of it on its way
            _signals.end(_signals.raised or next(iter(error.args), signal.SIGINT))
        if not isinstance(error, UserError) or given("traceback"):
            raise
        _leave(f"error: {error}")
    finally:
        _signals.cleanly = False  # nothing is left to be cleaned up


def _leave(message: str) -> None:
    """Ends the process with status 1, without waiting for threads: XLA's that compiles, or Orbax's after an error.

    Of several processes JAX has to tell the others, so only the compiling one is left to itself.
    """
    others = [t for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
    if any(t.name.startswith("compilation") for t in others) or (others and not _joined.is_set()):
        sys.stdout.flush()
        sys.stderr.write(message + "\n")
        sys.stderr.flush()
        os._exit(1)
    sys.exit(message)


_signals = Signals(lambda: given("stopped_status"))
_joined = threading.Event()  # other processes, by JAX
hear_signals = _signals.hear


def stop_cleanly() -> None:
    """From now on SIGTERM and SIGINT end this process through its cleaning up; so call this after slow imports."""
    _signals.cleanly = True


def start() -> None:
    """Joins the other processes that the flags speak of, if any, and lets only warnings through to the terminal."""
    import jax

    logging.set_verbosity(logging.WARNING)
    handler = logging.get_absl_handler()
    handler.setFormatter(standard_logging.Formatter("%(levelname)s: %(message)s"))
    # Orbax warns about ordinary things, such as a checkpoint between two evaluations, which has no score.
    handler.addFilter(lambda record: record.levelno > standard_logging.WARNING or "orbax" not in record.pathname)
    if given("coordinator"):
        _join(jax)
        hear_signals()  # JAX has taken SIGTERM


def _join(jax) -> None:
    """Waits for the other processes, then this one dies with them: JAX notices a dead one after 100 s at the latest."""
    where, seconds = given("coordinator"), given("join_timeout")
    address = None if where == "auto" else where

    # JAX's own timeout aborts the process with a C++ stack trace, so this one comes first.
    timer = end_after(
        seconds,
        f"error: not all processes met at --coordinator={where} within {seconds} s; start all with the same host:port, "
        "let the port through firewalls, or give a longer --join_timeout\n",
    )
    count, index = given("num_processes"), given("process_id")
    jax.distributed.initialize(address, count, index, initialization_timeout=seconds + 60)
    timer.cancel()
    _joined.set()


@contextlib.contextmanager
def failing_alone() -> Iterator[None]:
    """An error within it ends the process soon: JAX would wait at exit for the others, while they wait for this one."""
    try:
        yield
    except Exception:
        if given("coordinator"):
            end_after(FAILED_SECONDS)  # unless all fail alike
        raise


def end_after(seconds: int, message: str = "") -> threading.Timer:
    """Ends this process, wherever it waits, unless the timer is cancelled."""

    def end():
        sys.stderr.write(message)
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


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
