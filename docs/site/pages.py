"""MkDocs' hooks: the repository's own pages as pages of the site, and the table of all settings from their definitions.

Nothing is written twice. Links of those pages are turned to where their targets stand in the site; one to a file that
is no page becomes plain text.
"""

import dataclasses
import pathlib
import posixpath
import re
import typing

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

from ktda_jax.config import base, settings
from ktda_jax.config.data import PUBLISHED

ROOT = pathlib.Path(__file__).parents[2]
PAGES = {  # of the repository: of the site
    "README.md": "index.md",
    "launch/README.md": "launchers.md",
    "benchmarks/RESULTS.md": "measured/results.md",
    "benchmarks/NOTES.md": "measured/notes.md",
    "benchmarks/README.md": "measured/scripts.md",
    "benchmarks/evidence/EVIDENCE.md": "measured/evidence.md",
    "benchmarks/evidence/LANDSAT24.md": "measured/landsat24.md",
}
MATH = re.compile(r"\$\$(.+?)\$\$|(?<![\w$`])\$([^$`\n]+?)\$(?!\w)")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files, config):
    for source, page in PAGES.items():
        if not (ROOT / source).exists():
            raise PluginError(f"{source}, a page of the site, is gone; see PAGES in docs/site/pages.py")
        files.append(File.generated(config, page, content=turned((ROOT / source).read_text(), source, page)))
    return files


def on_page_markdown(markdown, page, **_):
    uri = page.file.src_uri
    if uri == "settings.md":
        return markdown + "\n" + "\n".join(tables(settings.Settings, "config", base.base()))
    if uri == "method.md":
        markdown = MATH.sub(formula, markdown)
    return markdown if uri in PAGES.values() else turned(markdown, f"docs/{uri}", uri)


def formula(match) -> str:
    """LaTeX as MathML, which browsers draw without a script from elsewhere."""
    block, inline = match.groups()  # within a span, since Markdown takes a line that begins with <math> for a block
    return convert(block, display="block") if block else f"<span>{convert(inline)}</span>"


def turned(markdown: str, source: str, page: str) -> str:
    """The links of a page, from where its file lies in the repository to where it lies in the site."""

    def link(match):
        mark, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or "://" in path:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / path).exists():
            return match[0]  # mkdocs says that it is broken
        there = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if there is None:
            return text if text.startswith("`") else f"`{text}`"
        relative = posixpath.relpath(there, posixpath.dirname(page) or ".")
        return f"{mark}[{text}]({relative}{'#' + anchor if anchor else ''})"

    return LINK.sub(link, markdown)


def tables(cls, where: str, values) -> list[str]:
    """A heading and a table for each section, in the order of the definitions."""
    kinds, rows, lines, inner = typing.get_type_hints(cls), [], [], []
    for field in dataclasses.fields(cls):
        meta, name = field.metadata, f"{where}.{field.name}"
        value = values.get(field.name) if values is not None else None
        if dataclasses.is_dataclass(kinds[field.name]):
            inner += ["", f"## {name}", "", meta["meaning"][0].upper() + meta["meaning"][1:] + ".", ""]
            inner += tables(kinds[field.name], name, value)
        else:
            meaning = meta["meaning"].replace("|", "\\|")
            meaning += f" ({meta['unit']})" * bool(meta["unit"])
            source = "published" if meta["source"] == PUBLISHED else meta["source"]
            note = ", ".join(filter(None, [source, "may change when resumed" * meta["runtime"]]))
            rows.append(f"| `{name}` | {meaning} | `{_plain(value)}` | {note} |")
    if rows:
        lines += ["| setting | meaning (unit) | default | |", "| --- | --- | --- | --- |", *rows]
    return lines + inner


def _plain(value) -> str:
    return "None" if value is None else repr(value.to_dict() if hasattr(value, "to_dict") else value)
