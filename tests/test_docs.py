"""The documentation's site: built strictly, with every setting; skipped where mkdocs is not installed (.[docs])."""

import dataclasses
import html
import re
import shutil
import subprocess
import sys
import typing

import pytest
import runs

from ktda_jax.config.settings import Settings

for name in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
    pytest.importorskip(name)


def build(root, site):
    """`mkdocs build` of the pages in `root`; its return code and what it says."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(root / "mkdocs.yml"), "-d", str(site)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=runs.REPOSITORY)
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    code, said = build(runs.REPOSITORY, folder)
    assert code == 0, said
    return folder


def keys(cls, where="config"):
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, inner = f"{where}.{field.name}", kinds[field.name]
        yield from keys(inner, name) if dataclasses.is_dataclass(inner) else [name]


def test_every_setting_has_its_row(site):
    page = (site / "settings" / "index.html").read_text()
    rows = re.findall(r"<tr>\s*<td><code>(config[\w.]+)</code></td>\s*<td>(.*?)</td>", page)
    assert [name for name, _ in rows] and sorted(name for name, _ in rows) == sorted(keys(Settings))
    assert all(meaning for _, meaning in rows)
    assert "optimiser steps" in html.unescape(dict(rows)["config.total_steps"])


def test_pages_take_nothing_from_elsewhere(site):
    """No script, style or font from another host: they work without a network."""
    for page in site.rglob("*.html"):
        found = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?://[^\s\">]+)", page.read_text())
        assert not [address for address in found if "canonical" not in address], page


def test_formulas_are_drawn_and_pages_of_the_repository_are_there(site):
    assert (site / "method" / "index.html").read_text().count("<math") > 10
    front = (site / "index.html").read_text()
    assert 'href="tutorial/"' in front and 'src="demo.png"' in front
    assert "Launchers" in (site / "launchers" / "index.html").read_text()


def test_a_broken_link_fails(site, tmp_path):
    root = tmp_path / "repository"
    for name in ("docs", "launch", "benchmarks", "ktda_jax"):
        ignored = shutil.ignore_patterns("rows", "draws", "*.png", "__pycache__")
        shutil.copytree(runs.REPOSITORY / name, root / name, ignore=None if name == "docs" else ignored)
    for name in ("README.md", "mkdocs.yml"):
        shutil.copy(runs.REPOSITORY / name, root / name)
    page = root / "docs" / "howto" / "maps.md"
    page.write_text(page.read_text() + "\n[gone](nowhere.md) and [other](own_data.md#no-such-heading)\n")
    code, said = build(root, tmp_path / "site")
    assert code == 1 and "nowhere.md" in said and "no-such-heading" in said
