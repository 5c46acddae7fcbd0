"""`ktda VERB` runs what `python -m ktda_jax.VERB` runs."""

import importlib.util
import sys

import pytest

from ktda_jax import verbs


@pytest.mark.parametrize("verb", verbs.VERBS)
def test_every_verb_runs_as_a_program(verb, monkeypatch):
    seen = {}

    def run_module(name, run_name, alter_sys):
        seen.update(name=name, run_name=run_name, argv=sys.argv[:])

    monkeypatch.setattr(verbs.runpy, "run_module", run_module)
    monkeypatch.setattr(sys, "argv", ["/bin/ktda", verb, "--config=a.py"])
    verbs.main()
    assert seen == {"name": f"ktda_jax.{verb}", "run_name": "__main__", "argv": [f"ktda {verb}", "--config=a.py"]}
    assert importlib.util.find_spec(f"ktda_jax.{verb}") is not None


def test_without_a_verb_all_are_listed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ktda"])
    verbs.main()
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert listed == list(verbs.VERBS)
    monkeypatch.setattr(sys, "argv", ["ktda", "trian"])
    with pytest.raises(SystemExit, match="error: ktda knows no 'trian'; it knows main, inspect"):
        verbs.main()


def test_help_is_that_of_the_verb(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ktda", "convert", "--help"])
    with pytest.raises(SystemExit):
        verbs.main()
    assert "published weights into our folder, or back" in capsys.readouterr().out
