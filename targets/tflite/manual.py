"""The operator table of docs/operators.md, read off the operators' own entries.

python -m edgeship.targets.tflite.manual > docs/operators.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from edgeship.calibration.readback import QOPERATORS
from edgeship.targets.tflite.op import Int8, Limit, Op
from edgeship.targets.tflite.ops import EXPANSIONS, REGISTRY
from edgeship.targets.tflite.ops.loop import UPDATE

AT_CONVERSION = {
    "Constant": "becomes a constant of the file",
    "Dropout": "vanishes: inference only",
    "Shape": "is computed at conversion; also where dimensions are dynamic",
    "Size": "is computed at conversion; also where dimensions are dynamic",
}
"""Operators that nothing is written for."""
HEAD = """# Operators

What becomes of each operator of the ONNX standard in TFLite. This page is generated from the converter's own entries by
`python -m edgeship.targets.tflite.manual`; a test compares the two. `edgeship inspect MODEL.onnx --target tflite` tells
of one model what stands in the way, without converting it.

- **native**: written as the shortest exact form in TFLite's builtin operators, a kernel of its own where there is one.
- **by others**: written as other ONNX operators of this table, which is where their limits stand.
- **as QDQ**: written as DequantizeLinear, the float operator and QuantizeLinear (the standard's and ONNX Runtime's).
- **by definition**: written as the ONNX standard itself defines it by other operators.
- Operators on constants are computed at conversion, up to 16 million elements.
- Types that a kernel does not take are cast to ones that it does, where no value changes.
- int8: "same scale" means that inputs and outputs share their parameters, which edgeship's quantizer sees to; a number
  is the scale that the kernel itself fixes for its output. "-": it runs in float32, between DEQUANTIZE and QUANTIZE.
  "in reals": so does this, unless the file is to be `integer_only`, since LiteRT's kernel for the integers is slow.
  What simplification folds away (BatchNormalization behind a convolution, for example) needs no kernel.
- int16: the kernel takes activations of 16 bits with zero point 0 too (16x8: weights of 8 bits, biases of 64).
- hybrid: the kernel takes int8 weights per channel with float activations, which it rounds at run time.

| operator | opsets | how | int8 | int16 | hybrid | what it takes |
|---|---|---|---|---|---|---|
"""


def table() -> str:
    """The page's text."""
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in _rows()) + "\n" + _absent()


def _rows() -> Iterator[Sequence[str]]:
    for name in sorted({*REGISTRY, *EXPANSIONS, *AT_CONVERSION, *QOPERATORS, *_defined()} - {UPDATE}):
        if name in AT_CONVERSION and name not in REGISTRY:
            yield name, "7+", "at conversion", "-", "-", "-", AT_CONVERSION[name]
        elif name in QOPERATORS:
            yield name, f"{max(7, _oldest(name))}+", "as QDQ", "yes", "-", "-", ""
        elif name in EXPANSIONS:
            yield name, f"{max(EXPANSIONS[name].since, _oldest(name))}+", "by others", "-", "-", "-", ""
        elif name in REGISTRY:
            op = REGISTRY[name]
            yield (
                name,
                f"{max(op.since, _oldest(name))}+",
                "native",
                _int8(op.int8),
                _int16(op.int8),
                _hybrid(op),
                _limits(op),
            )
        else:
            yield name, f"{max(7, _oldest(name))}+", "by definition", "-", "-", "-", ""


def _absent() -> str:
    known = {*REGISTRY, *EXPANSIONS, *AT_CONVERSION, *QOPERATORS, *_defined()}
    others = sorted({schema.name for schema in _standard()} - known)
    return f"Not converted, with a message that says so: {', '.join(others)}.\n"


def _int8(rule: Int8 | None) -> str:
    if rule is None:
        return "-"
    real = ", in reals" if rule.real_is_faster is True else ""
    if rule.fixed_output:
        return f"{rule.fixed_output.scale:.6g}, zero point {rule.fixed_output.zero_point}{real}"
    return f"{'same scale' if rule.shares_scale else 'yes'}{real}"


def _int16(rule: Int8 | None) -> str:
    if rule is None or rule.wide is None:
        return "-"
    fixed = rule.wide.fixed_output
    return f"{fixed.scale:.6g}" if fixed else "same scale" if rule.shares_scale else "yes"


def _hybrid(op: Op) -> str:
    return "-" if op.hybrid is None else "yes"


def _limits(op: Op) -> str:
    """The docstrings of the entry's limits; those that only bind int8 say so."""
    said = [_line(limit) for limit in op.limits]
    said += [f"int8: {_line(limit)}" for limit in (op.int8.limits if op.int8 else ()) if limit not in op.limits]
    said += [f"int8: Input {index} wants zero point 0 where it is computed." for index in _symmetric(op)]
    said += [f"hybrid: {_line(limit)}" for limit in op.hybrid or () if limit not in (op.int8.limits if op.int8 else ())]
    return " ".join(dict.fromkeys(line for line in said if line))


def _symmetric(op: Op) -> list[int]:
    return sorted(op.int8.symmetric) if op.int8 else []


def _line(limit: Limit) -> str:
    return " ".join((limit.__doc__ or "").strip().split("\n\n")[0].split()).replace("|", "or")


def _standard() -> list[Any]:
    """The newest definitions of the standard's operators, deprecated ones left out."""
    import onnx

    return [schema for schema in onnx.defs.get_all_schemas() if not schema.domain and not schema.deprecated]


def _oldest(name: str) -> int:
    """The opset that first had the operator."""
    import onnx

    every = onnx.defs.get_all_schemas_with_history()
    return min((schema.since_version for schema in every if schema.name == name and not schema.domain), default=1)


def _defined() -> set[str]:
    """Operators that have no entry, and that the standard defines by others which have."""
    schemas = {schema.name: schema for schema in _standard()}
    found: set[str] = set()

    def known(name: str, seen: frozenset[str]) -> bool:
        if name in REGISTRY or name in EXPANSIONS or name in AT_CONVERSION:
            return True
        schema = schemas.get(name)
        if schema is None or name in seen or name.startswith("Sequence"):
            return False
        if schema.has_function:
            return all(known(node.op_type, seen | {name}) for node in schema.function_body.node)
        return bool(schema.has_context_dependent_function) and name not in ("Bernoulli",)

    for name in schemas:
        if name not in REGISTRY and name not in EXPANSIONS and known(name, frozenset()):
            found.add(name)
    return found


if __name__ == "__main__":
    sys.stdout.write(table())
