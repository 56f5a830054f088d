"""Returns ONNX models read from files that nobody vouches for, and the bytes of models.

A model file may be truncated, random, or hostile: external data may name any path of the machine (CVE-2024-27318 and
relatives). Everything is checked here, once, before a graph is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgeship.calibration.errors import InputError
from edgeship.calibration.graph.file_kind import ONNX, looks_like

if TYPE_CHECKING:
    import onnx

LIMIT = 2**31 - 1
"""Bytes: protobuf's own limit for one message."""
_WEIGHTED = frozenset({"BatchNormalization", "Conv", "ConvTranspose", "Gemm", "MatMul"})


def load_onnx(path: str | Path) -> ir.Model:
    """The model at `path` with all its data in memory.

    Raises InputError when the file is missing, too large, not ONNX, breaks ONNX's rules, has external data outside its
    own folder or cut short, or weights that are not finite numbers.
    """
    path = Path(path)
    proto, content = _read(path)
    _check_rules(proto, content, path)
    try:
        model = ir.from_proto(proto)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise InputError(f"{path} is not a well-formed ONNX model: {_first_line(error)}") from error
    _hold_arrays(model)
    check_finite(model, str(path))
    return model


def read_proto(path: str | Path) -> onnx.ModelProto:
    """The parsed file, external data read in after its place was checked. Raises InputError as `load_onnx` does."""
    return _read(Path(path))[0]


def _read(path: Path) -> tuple[onnx.ModelProto, bytes | None]:
    """The parsed file, and its content where that still is all there is to know."""
    content = read_bytes(path)
    proto = _parsed(content, path)
    if not proto.graph.node or not proto.opset_import:
        raise InputError(f"{path} is not an ONNX model: it has no nodes or names no operator set")
    if not proto.graph.output:
        raise InputError(f"{path} has no outputs; accepted: a model with at least one")
    as_written = not _forget_impossible_sizes(proto.graph)
    external = _external(proto)
    spans = [_external_span(tensor, path) for tensor in external]
    total = path.stat().st_size + sum(end - start for _, start, end in spans)
    if total > LIMIT:
        raise InputError(
            f"{path} holds {total / 1e9:.2f} GB with its external data; accepted: up to {LIMIT / 1e9:.2f} GB, which is "
            "what a TFLite file and an ONNX model in memory can address"
        )
    for tensor, span in zip(external, spans, strict=True):
        _read_external(tensor, span)
    return proto, content if as_written and not external else None


def external_files(path: Path) -> list[Path]:
    """The files beside an ONNX model that hold its external data, sorted. Raises InputError as `load_onnx` does."""
    return sorted({_external_span(tensor, path)[0] for tensor in _external(_parsed(read_bytes(path), path))})


def _parsed(content: bytes, path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except (DecodeError, ValueError, RuntimeError) as error:
        reason = looks_like(content, ONNX) or f"damaged or another format: {_first_line(error)}"
        raise InputError(f"{path} is not an ONNX model: {reason}") from error
    return proto


def _external(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    import onnx

    return [tensor for tensor in _tensors(proto.graph) if tensor.data_location == onnx.TensorProto.EXTERNAL]


def _forget_impossible_sizes(graph: onnx.GraphProto) -> bool:
    """Whether there were any: makes unknown what some exporters write as 0 or -1, the sizes of inputs left open."""
    sizes = [size for value in graph.input for size in value.type.tensor_type.shape.dim]
    impossible = [size for size in sizes if size.HasField("dim_value") and size.dim_value < 1]
    for size in impossible:
        size.ClearField("dim_value")
    return bool(impossible)


def read_bytes(path: Path) -> bytes:
    """The content of a model file. Raises InputError when it is missing, unreadable, empty or over protobuf's limit."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise InputError(f"{path} is not a file; accepted: a model file")
        if not 0 < size <= LIMIT:
            raise InputError(f"{path} has {size} bytes; accepted: 1 to {LIMIT}")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def to_bytes(model: ir.Model) -> bytes:
    """The serialized model; equal models give equal bytes."""
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content


def _hold_arrays(model: ir.Model) -> None:
    """Nothing; weights are NumPy arrays, where each look at one would have copied it out of its protobuf message."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.serde.TensorProtoTensor) and tensor.raw.HasField("raw_data"):
                value.const_value = ir.Tensor(
                    tensor.numpy(), tensor.dtype, name=tensor.name, doc_string=tensor.doc_string,
                    metadata_props=tensor.metadata_props,
                )  # fmt: skip


def check_finite(model: ir.Model, where: str) -> None:
    """Raises InputError for NaN in any constant, or infinities in the weights of a layer; each is named.

    An infinity elsewhere can be meant: the bound of a Clip, an attention mask.
    """
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None or not tensor.dtype.is_floating_point():
                continue
            values = np.asarray(tensor.numpy(), np.float32) if tensor.dtype.itemsize < 4 else tensor.numpy()
            if np.isfinite(values).all():
                continue
            users = [f"{use.node.op_type} {use.node.name or ''}".strip() for use in value.uses()]
            layer = any(use.node.op_type in _WEIGHTED for use in value.uses())
            nans, infinite = int(np.isnan(values).sum()), int(np.isinf(values).sum())
            if nans or layer:
                raise InputError(
                    f"{where}: initializer {name!r} (used by {', '.join(users) or 'nothing'}) holds {nans} NaN and "
                    f"{infinite} infinite values of {values.size}; accepted: finite numbers"
                )


def _check_rules(proto: onnx.ModelProto, content: bytes | None, path: Path) -> None:
    """Raises InputError where the model breaks a rule. `content`, if given, is `proto` serialized."""
    import onnx

    for kind, values in (("input", proto.graph.input), ("output", proto.graph.output)):
        for value in values:
            if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape"):
                raise InputError(
                    f"{path}: {kind} {value.name!r} declares no shape; accepted: sizes, dynamic ones named"
                )
    newest = onnx.defs.onnx_opset_version()
    for opset in proto.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > newest:
            raise InputError(
                f"{path} declares opset {opset.version}; the newest that onnx {onnx.__version__} defines is {newest}; "
                "export the model to that or an older one, or install a newer onnx"
            )
    try:
        onnx.checker.check_model(proto if content is None else content)
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} breaks the rules of ONNX: {_in_one_line(error)}") from error


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from _tensors(attribute.g)
            for subgraph in attribute.graphs:
                yield from _tensors(subgraph)


def _external_span(tensor: onnx.TensorProto, path: Path) -> tuple[Path, int, int]:
    """The file that holds the tensor's data, and from which byte to which."""
    facts = {entry.key: entry.value for entry in tensor.external_data}
    place = _external_place(tensor.name, facts.get("location", ""), path)
    try:
        offset, length = int(facts.get("offset") or 0), int(facts.get("length") or -1)
    except ValueError as error:
        raise InputError(
            f"{path}: external data of {tensor.name!r} has no whole numbers for offset and length: {facts}"
        ) from error
    size = place.stat().st_size
    end = size if length < 0 else offset + length
    if offset < 0 or not offset <= end <= size or end - offset > LIMIT:
        raise InputError(
            f"{path}: external data of {tensor.name!r} is bytes {offset} to {end} of {place.name}, which has {size}"
        )
    return place, offset, end


def _read_external(tensor: onnx.TensorProto, span: tuple[Path, int, int]) -> None:
    import onnx

    place, start, end = span
    with place.open("rb") as file:
        file.seek(start)
        tensor.raw_data = file.read(end - start)
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.DEFAULT


def _external_place(name: str, location: str, path: Path) -> Path:
    parts = PurePosixPath(location)
    windows = PureWindowsPath(location)
    if not location or parts.is_absolute() or windows.is_absolute() or windows.drive or ".." in windows.parts:
        raise InputError(
            f"{path}: external data of {name!r} lies at {location!r}; accepted: a file in the model's own folder"
        )
    folder = path.resolve().parent
    place = (folder / location).resolve()
    if not place.is_relative_to(folder):
        raise InputError(
            f"{path}: external data of {name!r} lies at {location!r}, which leads out of the model's folder to {place}"
        )
    if not place.is_file():
        raise InputError(f"{path}: external data of {name!r} should be in {location!r}, which does not exist")
    return place


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _in_one_line(error: Exception) -> str:
    """The checker's whole message: the node that it is about stands in its later lines."""
    return " ".join(str(error).split())[:300] or type(error).__name__
