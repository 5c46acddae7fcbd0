"""How settings are declared, checked one by one, and turned into nested dataclasses and back into JSON."""

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ktda_jax import UserError

REQUIRED = object()
Fits = tuple[Callable[[Any], bool], str]  # whether a value can be, and what to give instead
SHARE = (lambda x: 0 <= x < 1, "a number from 0 to below 1")
POSITIVE = (lambda x: 0 < x < math.inf, "a number above 0")
NOT_NEGATIVE = (lambda x: 0 <= x < math.inf, "at least 0")
SIZE = (lambda x: x >= 1, "at least 1")
SIZES = (lambda x: bool(x) and min(x) >= 1, "whole numbers of at least 1")


def setting(
    meaning: str, *, unit: str = "", source: str = "", fits: Fits | None = None, absent: Any = REQUIRED,
    runtime: bool = False,
) -> Any:  # fmt: skip
    """A field. `runtime`: may differ between two runs of one workdir: how it runs, not what it computes."""
    return dataclasses.field(
        metadata=dict(meaning=meaning, unit=unit, source=source, fits=fits, absent=absent, runtime=runtime)
    )


def section(meaning: str, *, runtime: bool = False, optional: bool = False) -> Any:
    """`optional`: a config or a workdir may lack it."""
    return dataclasses.field(metadata=dict(meaning=meaning, runtime=runtime, optional=optional))


def build(cls, values: Mapping[str, Any], where: str, strict: bool):
    """`cls` and the sections below it from nested mappings. UserError names what is missing, of another type, or out of
    range; with `strict` also what is unknown."""
    fields, kinds = _fields(cls), typing.get_type_hints(cls)
    for key in values:
        if key not in fields and strict:
            raise UserError(f"{where}.{key} is not a setting; known: {', '.join(fields)}")
    built = {}
    for name, field in fields.items():
        if dataclasses.is_dataclass(kinds[name]):
            inner = values.get(name, {} if field.metadata["optional"] else None)
            if not isinstance(inner, Mapping):
                raise UserError(f"{where}.{name} is {inner!r}; give its settings: {field.metadata['meaning']}")
            built[name] = build(kinds[name], inner, f"{where}.{name}", strict)
            continue
        meta = field.metadata
        value = values.get(name, meta["absent"])
        if value is REQUIRED:
            raise UserError(f"{where}.{name} is missing; {meta['meaning']}")
        if not _is_a(value, kinds[name]):
            raise UserError(f"{where}.{name} is {value!r}; give {_in_words(kinds[name])}: {meta['meaning']}")
        if value is not None and meta["fits"] is not None and not meta["fits"][0](value):
            raise UserError(f"{where}.{name} is {value}; give {meta['fits'][1]}")
        built[name] = value
    return cls(**built)


@functools.cache
def _fields(cls) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls)}


def plain(value):
    """Mappings as dicts, sequences and arrays as tuples, NumPy's numbers as Python's."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    return tuple(map(plain, value)) if isinstance(value, list | tuple) else value


def _is_a(value, kind) -> bool:
    """Whether a value is of a field's type; how long a tuple must be is for its own check to say."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(_is_a(value, each) for each in inner)
    if kind in (tuple, dict) or origin is tuple:
        return isinstance(value, tuple) and all(_is_a(each, inner[0]) for each in value if inner)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, kind)


def _in_words(kind) -> str:
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "a word", types.NoneType: "None"}
    if isinstance(kind, types.UnionType):
        return " or ".join(map(_in_words, typing.get_args(kind)))
    inner = typing.get_args(kind)
    if not inner:
        return words.get(kind, "several values")
    return {int: "whole numbers", float: "numbers", str: "words"}.get(inner[0], "several values")


def flat(settings: Any, *, runtime: bool = True) -> dict[str, Any]:
    """{'data.crop': [256, 256], ...} as JSON has it; without the `runtime` ones where they do not matter."""

    def walk(section, prefix):
        for name, field in _fields(type(section)).items():
            if not runtime and field.metadata["runtime"]:
                continue
            value = getattr(section, name)
            if dataclasses.is_dataclass(value):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return json.loads(json.dumps(dict(walk(settings, ""))))
