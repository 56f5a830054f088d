"""Returns a checked, frozen `Recipe` from one TOML file: everything a user can set, with documented defaults."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PlainSerializer,
    PlainValidator,
    PositiveInt,
    PrivateAttr,
    WithJsonSchema,
)

from edgeship.calibration.errors import InputError

if TYPE_CHECKING:
    from edgeship.calibration.data import Preprocessing, Samples
    from edgeship.calibration.types import WeightScheme

DataField = Literal["calibration", "evaluation", "labels"]
GATES: Mapping[str, str] = {
    "accuracy.max_drop": "largest drop of top-1 against fp32, in percentage points",
    "accuracy.min_top1": "smallest top-1 of the artifact, in percent",
    "parity.max_steps": "largest difference from the quantized reference at any output, in quantization steps",
    "parity.mean_steps": "largest mean difference from the quantized reference, in quantization steps",
    "parity.min_agreement": "smallest share of equal arg-max against the quantized reference, 0..1",
    "latency.min_speedup": "smallest ratio of the fp32 median to the int8 median, same runtime",
    "latency.max_median_ms": "largest int8 median, in milliseconds",
    "size.max_bytes": "largest artifact, in bytes",
    "parity.max_saturated_layers": "largest number of layers that clip on x86 without VNNI (0 with any parity gate)",
    "int8_share.min": "smallest share of multiply-accumulates that integer kernels execute, 0..1",
}
"""Every gate a recipe may set, and what its limit means."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


def _shape(value: object) -> tuple[int | str, ...]:
    accepted = 'a list of positive integers, batch first; the batch may be "dynamic", such as [1, 3, 224, 224]'
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(accepted)
    batch, *rest = value
    if not (batch == "dynamic" or _is_positive(batch)) or not all(_is_positive(size) for size in rest):
        raise ValueError(accepted)
    return tuple(value)


def _size(value: object) -> int | tuple[int, int]:
    if _is_positive(value):
        return value  # type: ignore[return-value]  # checked by _is_positive
    if isinstance(value, list | tuple) and len(value) == 2 and all(_is_positive(side) for side in value):
        return (value[0], value[1])
    raise ValueError("a positive integer, or [height, width]")


def _per_channel(value: object) -> tuple[float, ...]:
    items: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if not items or not all(isinstance(item, int | float) and not isinstance(item, bool) for item in items):
        raise ValueError("a number, or one number per channel, in pixel units (0..255)")
    return tuple(float(item) for item in items)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


_POSITIVE = {"type": "integer", "exclusiveMinimum": 0}
Shape = Annotated[
    tuple[int | str, ...],
    PlainValidator(_shape),
    PlainSerializer(_plain),
    WithJsonSchema({"type": "array", "items": {"anyOf": [_POSITIVE, {"const": "dynamic"}]}}),
]
Size = Annotated[
    int | tuple[int, int],
    PlainValidator(_size),
    PlainSerializer(_plain),
    WithJsonSchema({"anyOf": [_POSITIVE, {"type": "array", "items": _POSITIVE, "minItems": 2, "maxItems": 2}]}),
]
PerChannel = Annotated[
    tuple[float, ...],
    PlainValidator(_per_channel),
    PlainSerializer(_plain),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "array", "items": {"type": "number"}}]}),
]


class Model(_Section):
    """Where the trained model comes from."""

    source: str = Field(description="PATH.py:factory, package.module:factory, or a model.onnx or model.pt2 file")
    weights: str | None = Field(
        default=None, description="a state dict (.pt) or .safetensors file for the factory's model"
    )
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the factory")


class Input(_Section):
    """The model's input tensor and how an image becomes one."""

    name: str | None = Field(default=None, description="the input's name; the exporter's when not given")
    shape: Shape | None = Field(
        default=None, description='batch first, NCHW; the batch may be "dynamic"; an ONNX file\'s own'
    )
    mean: PerChannel = Field(default=(0.0,), description="subtracted from each pixel (0..255), per channel")
    std: PerChannel = Field(default=(1.0,), description="divides each pixel after the mean is subtracted, per channel")
    resize: Size | None = Field(default=None, description="the shorter side, or [height, width]")
    crop: Size | None = Field(default=None, description="centre crop after resizing")
    color: Literal["rgb", "bgr", "gray"] = Field(
        default="rgb", description="the channel order the model was trained with"
    )
    dtype: Literal["float32"] = Field(default="float32", description="the type of the float model's input")


class Data(_Section):
    """Real samples: to choose ranges with, and to judge the artifact with."""

    root: str = Field(default=".", description="the folder that file names in the lists are relative to")
    calibration: str | None = Field(default=None, description="a CSV (file[,label]), a folder of images, or an .npz")
    evaluation: str | None = Field(default=None, description="the same kinds; other samples than the calibration's")
    evaluation_samples: PositiveInt | None = Field(
        default=None, description="judge with this many, drawn with `seed`; all"
    )
    labels: str | None = Field(
        default=None, description="a CSV (file,label) for an evaluation folder or list without labels"
    )
    seed: NonNegativeInt = Field(default=0, description="draws samples where fewer than all are used")


class Quantize(_Section):
    """How the integers are chosen."""

    mode: Literal["static", "none"] = Field(
        default="static", description="static: int8 weights and activations; none: the model stays float"
    )
    algorithm: str = Field(
        default="minmax", description="the range algorithm: a file of edgeship.calibration.algorithms"
    )
    samples: PositiveInt = Field(default=100, description="calibration samples, drawn with `data.seed`")
    weights: Literal["auto", "shared", "full"] = Field(
        default="auto",
        description="auto: pair-limited where a target's CPUs would clip, full elsewhere; shared: pair-limited "
        "everywhere, so that all targets hold the same integers; full: nowhere (x86 without VNNI may clip)",
    )
    per_tensor: bool = Field(default=False, description="one weight scale per tensor instead of one per channel")


class TargetOptions(_Section):
    """What one target's artifact looks like; the target's own habit where nothing is said."""

    weights: Literal["full", "pair_limited"] | None = Field(default=None, description="overrides quantize.weights here")
    io_layout: Literal["nchw", "nhwc"] | None = Field(default=None, description="the artifact's image layout")
    io_dtype: Literal["float32", "int8", "uint8"] = Field(
        default="float32", description="the artifact's input and output type"
    )


class Benchmark(_Section):
    """How latency is measured on this machine."""

    threads: PositiveInt = Field(default=1, description="threads of each runtime")
    runs: PositiveInt = Field(default=200, description="timed inferences of each artifact")
    warmup: NonNegativeInt = Field(default=20, description="inferences before the timed ones")


class Parity(_Section):
    """How the artifacts are compared with the quantized reference."""

    samples: PositiveInt = Field(default=100, description="evaluation samples to compare on, drawn with `data.seed`")


class Golden(_Section):
    """The inputs and outputs recorded at export, against which every later model is checked."""

    samples: PositiveInt = Field(default=4, description="how many are recorded")


class Recipe(_Section):
    """One deployment: a model, its data, how to quantize it, for which targets, and what is good enough."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="letters, digits, . _ -")]
    model: Model
    input: Input = Input()
    data: Data = Data()
    quantize: Quantize = Quantize()
    targets: dict[str, TargetOptions] = Field(min_length=1, description="one table per target")
    gates: dict[str, float] = Field(default_factory=dict, description="a gate nobody sets is not a gate")
    benchmark: Benchmark = Benchmark()
    parity: Parity = Parity()
    golden: Golden = Golden()
    _path: Path = PrivateAttr(default=Path("recipe.toml"))
    _digests: dict[str, str | None] = PrivateAttr(default_factory=dict)

    @property
    def path(self) -> Path:
        """The recipe file, absolute."""
        return self._path

    @property
    def folder(self) -> Path:
        """The folder of the recipe file, which its relative paths start from."""
        return self._path.parent

    def dump(self, *sections: str) -> dict[str, Any]:
        """The named sections (all without names) as plain JSON values in a fixed order, for a stage's key."""
        return self.model_dump(mode="json", include=set(sections) or None)

    def resolve(self, text: str, field: str = "path") -> Path:
        """The absolute path that `text` means: `${NAME}` is an environment variable or `${data.root}`.

        Raises InputError where the variable is not set.
        """
        return (self.folder / self._expand(text, field)).absolute()

    def _expand(self, text: str, field: str) -> str:
        def value(match: re.Match[str]) -> str:
            name = match[1]
            if name == "data.root" and field != "data.root":
                return str(self.data_root)
            if name not in os.environ:
                raise InputError(
                    f"{self.path.name}: {field} = {text!r} needs the environment variable {name}, which is not set; "
                    f"set it, or give the value with --set {field}=PATH"
                )
            return os.environ[name]

        return re.sub(r"\$\{([^}]*)\}", value, text)

    @property
    def source_path(self) -> Path | None:
        """The model's file (.py, .onnx, .pt2); None when the source is `package.module:factory`."""
        place, _ = _split_factory(self.model.source)
        is_file = place.endswith((".py", ".onnx", ".pt2")) or "/" in place
        return self.resolve(place, "model.source") if is_file else None

    @property
    def source_factory(self) -> str | None:
        """The factory's name in a `.py` file or module; None for a model file."""
        return _split_factory(self.model.source)[1]

    @property
    def weights_path(self) -> Path | None:
        """The file with the model's weights; None when the source has its own."""
        return None if self.model.weights is None else self.resolve(self.model.weights, "model.weights")

    @property
    def data_root(self) -> Path:
        """The folder that data files are relative to."""
        return self.resolve(self.data.root, "data.root")

    def data_path(self, field: DataField) -> Path | None:
        """The file or folder of `data.<field>`, beside the recipe or else under `data.root`; None when unset.

        A path may lead into a .zip. Raises InputError naming both places when it is in neither.
        """
        from edgeship.calibration.file_tree import open_tree

        text: str | None = getattr(self.data, field)
        if text is None:
            return None
        places = [self.resolve(text, f"data.{field}"), self.data_root / self._expand(text, f"data.{field}")]
        for place in places:
            if place.exists() or open_tree(place) is not None:
                return place
        looked = " and ".join(str(place) for place in dict.fromkeys(places))
        raise InputError(f"{self.path.name}: data.{field} = {text!r} does not exist; looked for {looked}")

    def preprocessing(self, shape: Sequence[int] | None = None) -> Preprocessing:
        """How an image file becomes the model's input; `shape` is the model's own, used where the recipe has none.

        Raises InputError when neither gives a shape of four sides.
        """
        from edgeship.calibration.data import Preprocessing

        sides = self.input.shape or shape
        if sides is None:
            raise InputError(f"{self.path.name}: input.shape is not set, and images need it; accepted: [1, C, H, W]")
        part = self.input
        whole = tuple(-1 if side == "dynamic" else int(side) for side in sides)
        if len(whole) != 4:
            raise InputError(f"{self.path.name}: images need an input of four sides, [1, C, H, W]; seen: {list(sides)}")
        return Preprocessing(
            shape=whole, mean=part.mean, std=part.std, resize=part.resize, crop=part.crop, color=part.color
        )

    def calibration_samples(self, inputs: Mapping[str, Sequence[int]] | None = None) -> Samples:
        """`quantize.samples` samples to choose ranges with; `inputs` are the model's own input names and shapes."""
        if self.data.calibration is None:
            raise InputError(f"{self.path.name}: data.calibration is not set; int8 ranges are chosen on real samples")
        return self._samples("calibration", inputs).take(self.quantize.samples, self.data.seed)

    def evaluation_samples(self, inputs: Mapping[str, Sequence[int]] | None = None) -> Samples | None:
        """The samples to judge artifacts with; None when the recipe has none. `inputs`: see `calibration_samples`."""
        if self.data.evaluation is None:
            return None
        samples = self._samples("evaluation", inputs)
        count = self.data.evaluation_samples
        return samples if count is None else samples.take(count, self.data.seed)

    def data_digest(self, field: Literal["calibration", "evaluation"]) -> str | None:
        """SHA-256 over the contents of the samples of `data.<field>` and their preprocessing; None when unset."""
        if field not in self._digests:
            self._digests[field] = self._data_digest(field)
        return self._digests[field]

    def _data_digest(self, field: Literal["calibration", "evaluation"]) -> str | None:
        path = self.data_path(field)
        if path is None:
            return None
        if path.suffix.lower() == ".npz" and path.is_file():
            return hashlib.sha256(path.read_bytes()).hexdigest()
        stand_in = {} if self.input.shape else {"input": (1, 1 if self.input.color == "gray" else 3, 1, 1)}
        if field == "calibration":
            return self.calibration_samples(stand_in).digest()
        samples = self.evaluation_samples(stand_in)
        return None if samples is None else samples.digest()

    def _samples(self, field: DataField, inputs: Mapping[str, Sequence[int]] | None) -> Samples:
        from edgeship.calibration.data import open_samples

        path = self.data_path(field)
        if path is None:
            raise InputError(f"{self.path.name}: data.{field} is not set")
        name = self.input.name or next(iter(inputs or ()), "input")
        is_arrays = path.suffix.lower() == ".npz" and path.is_file()
        return open_samples(
            path,
            root=self.data_root,
            input_name=name,
            preprocessing=None if is_arrays else self.preprocessing((inputs or {}).get(name)),
            labels=self.data_path("labels") if field == "evaluation" else None,
            shapes=inputs if is_arrays else None,
        )

    def weight_scheme(self, target: str) -> WeightScheme:
        """Whether the artifact for `target` is made from full-range or pair-limited weights."""
        from edgeship.targets.base import load

        options = self.targets.get(target)
        if options and options.weights:
            return options.weights
        if self.quantize.weights == "auto":
            return load(target).weights
        return "pair_limited" if self.quantize.weights == "shared" else "full"

    def weight_schemes(self) -> tuple[WeightScheme, ...]:
        """The weight schemes that the recipe's targets need together, sorted; "full" is always among them."""
        return tuple(sorted({"full", *(self.weight_scheme(name) for name in self.targets)}))


def _split_factory(source: str) -> tuple[str, str | None]:
    place, colon, factory = source.rpartition(":")
    return (place, factory) if colon and factory.isidentifier() else (source, None)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors and the generated reference."""
    schema = Recipe.model_json_schema()
    schema["properties"]["gates"]["properties"] = {
        name: {"type": "number", "description": text} for name, text in GATES.items()
    }
    schema["properties"]["gates"]["additionalProperties"] = False
    return schema


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the TOML file `path` with `overrides` ("dotted.key=value") applied.

    Raises InputError for a file that cannot be read, is no TOML, or has an unknown key or a wrong value: with the key's
    dotted path, what was seen, what is accepted, and the key that was probably meant.
    """
    from edgeship.pipeline.recipe_reader import read_recipe

    recipe = read_recipe(Path(path), overrides)
    recipe._path = Path(path).absolute()
    return recipe
