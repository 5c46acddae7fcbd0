"""Where the bytes of a compiled step go: by what an operation is, and by the function of ours that asked for it.

Read from the compiled program's text. An operation reads its operands and writes its results, each once; what a loop
repeats counts once. What lies in the chip's own memory, S(1) in a layout, does not count here, though in XLA's sum. So
this one is smaller, and is for finding what to look at.
"""

import collections
import math
import re

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z\d]*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"\b(?:calls|body)=%([\w.-]+)")
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_BITS = re.compile(r"\d+")
_NUMBERED = re.compile(r"^(\d+) (.*)$")
_FIELD = re.compile(r"(\w+)=(\d+)")
OURS = "ktda_jax/models/"
COPIES = {"copy", "copy-start", "slice", "slice-start", "transpose", "pad", "concatenate"}
COPIES |= {"bitcast", "parameter", "fusion"}  # of which fusions of copies are made
# Neither reads nor writes: names for what is there. Nor do the second halves, -done, of what runs beside others.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "after-all"}


def touched(text: str) -> dict[tuple[str, str], float]:
    """{(kind, place): GB}, most first. place: module and function, `backward` behind it for gradients."""
    computations, frames = _computations(text), _frames(text)
    inside = {name: {op for _, _, op, _ in lines} for name, lines in computations.items()}
    found = collections.Counter()
    for name in _run(computations):
        sizes = {result: _bytes(shapes) for result, shapes, _, _ in computations[name]}
        for _, shapes, op, rest in computations[name]:
            if op in FREE or op.endswith("-done"):
                continue
            operands = re.findall(r"%([\w.-]+)", rest.partition("), ")[0])
            size = _bytes(shapes) + sum(sizes.get(operand, 0) for operand in operands)
            if op.endswith("-start"):  # results of the first half name the operands again
                size = sum(sizes.get(operand, 0) for operand in operands)
            if size:
                found[_kind(op, rest, inside), _place(rest, frames)] += size / 1e9
    return dict(found.most_common())


def table(found: dict[tuple[str, str], float], rows: int = 12) -> str:
    """The sums by kind, then the largest of kind and place."""
    kinds = collections.Counter()
    for (kind, _), size in found.items():
        kinds[kind] += size
    lines = [
        "GB that leave or enter a chip's memory: "
        + ", ".join(f"{kind} {size:.1f}" for kind, size in kinds.most_common())
    ]
    lines += [f"{size:8.2f}  {kind:12}{place}" for (kind, place), size in list(found.items())[:rows]]
    return "\n".join(lines)


def _computations(text: str) -> dict[str, list[tuple[str, str, str, str]]]:
    """By name, the operations: result, its shapes, opcode, and what follows. The entry is named ''."""
    found, here = {}, None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            here = found.setdefault("" if header[1] else header[2], [])
        elif here is not None and (operation := _OPERATION.match(line)):
            here.append(operation.groups())
    return found


def _run(computations) -> list[str]:
    """The entry and the bodies of loops, not what is fused into one operation."""
    names, new = [], [""]
    while new:
        names += new
        new = [
            body
            for name in new
            for _, _, op, rest in computations[name]
            if op == "while"
            for body in re.findall(r"body=%([\w.-]+)", rest)
        ]
    return names


def _bytes(shapes: str) -> float:
    """Of all arrays of a result but those in a chip's own memory, S(1) and more."""
    return sum(
        math.prod(int(n) for n in dims.split(",") if n) * (8 if dtype == "pred" else int(_BITS.search(dtype)[0])) / 8
        for dtype, dims, layout in _ARRAY.findall(shapes)
        if "S(" not in layout
    )


def _kind(op: str, rest: str, inside: dict[str, set[str]]) -> str:
    """By what is fused in it, the dearest first."""
    called = _CALLED.search(rest)
    ops = {op, *inside.get(called[1], ())} if called else {op}
    if op == "custom-call":
        return "kernel"
    if op.startswith(("all-", "reduce-scatter", "collective")):
        return "collective"
    if ops & {"convolution", "dot"}:
        return "product"
    if ops & {"reduce", "reduce-window"}:
        return "reduction"
    return "copy" if ops <= COPIES else "elementwise"


def _frames(text: str) -> dict[int, str]:
    """{number of a stack frame: the innermost function of ours in it}, as `fmm.MLPBlock.__call__`."""
    parts = {name: {} for name in ("FileNames", "FunctionNames", "FileLocations", "StackFrames")}
    here = None
    for line in text.splitlines():
        if line in parts:
            here = parts[line]
        elif here is not None and (numbered := _NUMBERED.match(line)):
            here[int(numbered[1])] = numbered[2]
        elif line.startswith(("%", "ENTRY")):
            break
    files, functions = parts["FileNames"], parts["FunctionNames"]
    locations = {k: dict(_FIELD.findall(v)) for k, v in parts["FileLocations"].items()}
    stacks = {k: dict(_FIELD.findall(v)) for k, v in parts["StackFrames"].items()}

    def place(number: int) -> str:
        while number:
            fields = stacks[number]
            location = locations[int(fields["file_location_id"])]
            file = files[int(location["file_name_id"])].strip('"')
            if OURS in file:
                module = file.rpartition("/")[2].removesuffix(".py")
                return f"{module}.{functions[int(location['function_name_id'])].strip(chr(34))}"
            parent = int(fields.get("parent_frame_id", 0)) - 1  # as written, one more than the parent's number
            number = parent if parent != number else 0
        return "elsewhere"

    return {number: place(number) for number in stacks}


def _place(rest: str, frames: dict[int, str]) -> str:
    frame = _FRAME.search(rest)
    place = frames.get(int(frame[1]), "elsewhere") if frame else "elsewhere"
    return place + (" backward" if "transpose(" in rest else "")
