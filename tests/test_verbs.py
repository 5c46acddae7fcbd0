"""`ktda VERB` runs what `python -m ktda_jax.VERB` runs."""

import importlib.util
import subprocess
import sys

import pytest
import runs

from ktda_jax import cli


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_runs_as_a_program(verb, monkeypatch):
    seen = {}

    def run_module(name, run_name, alter_sys):
        seen.update(name=name, run_name=run_name, argv=sys.argv[:])

    monkeypatch.setattr(cli.runpy, "run_module", run_module)
    monkeypatch.setattr(sys, "argv", ["/bin/ktda", verb, "--config=a.py"])
    cli.main()
    assert seen == {"name": f"ktda_jax.{verb}", "run_name": "__main__", "argv": [f"ktda {verb}", "--config=a.py"]}
    assert importlib.util.find_spec(f"ktda_jax.{verb}") is not None


@pytest.mark.parametrize("verb", cli.VERBS)
def test_errors_in_flags_do_not_wait_for_jax(verb):
    assert _without_jax(verb, "--nosuch=1") == "error: Unknown command line flag 'nosuch'\n"


@pytest.mark.parametrize("verb", ["main", "inspect", "extract", "benchmark", "plan"])
def test_nor_do_settings_that_cannot_work(verb):
    found = _without_jax(verb, f"--config={runs.REPOSITORY / 'configs/demo.py'}", "--config.batch_size=0")
    assert found == "error: config.batch_size is 0; give at least 1\n"


def _without_jax(verb: str, *flags: str) -> str:
    """What a verb says that fails where JAX cannot even be imported."""
    code = "import runpy, sys; sys.modules['jax'] = None; runpy.run_module(sys.argv.pop(1), run_name='__main__')"
    command = [sys.executable, "-c", code, f"ktda_jax.{verb}", *flags]
    done = subprocess.run(command, cwd=runs.REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1
    return done.stderr


@pytest.mark.parametrize(
    "installed, node, variable, expected",
    [
        (True, None, None, "cpu"),
        (False, None, None, None),
        (True, "/dev/accel0", None, None),
        (True, None, "TPU_NAME", None),
    ],
)
def test_jax_does_not_try_a_tpu_that_is_not_there(monkeypatch, installed, node, variable, expected):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(cli.glob, "glob", lambda pattern: [node] if node and pattern == "/dev/accel*" else [])
    environment = {variable: "x"} if variable else {}
    monkeypatch.setattr(cli.os, "environ", environment)
    cli.quiet_libtpu()
    assert environment.get("JAX_PLATFORMS") == expected


def test_without_a_verb_all_are_listed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ktda"])
    cli.main()
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert listed == list(cli.VERBS)
    monkeypatch.setattr(sys, "argv", ["ktda", "trian"])
    with pytest.raises(SystemExit, match="error: ktda knows no 'trian'; it knows main, inspect"):
        cli.main()


def test_help_is_that_of_the_verb(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ktda", "convert", "--help"])
    monkeypatch.setattr(cli, "hear_signals", lambda: None)  # they are pytest's
    with pytest.raises(SystemExit):
        cli.main()
    assert "published weights into our folder, or back" in capsys.readouterr().out
