"""Returns a checked, frozen `Recipe` from one TOML file: everything a user can set, with documented defaults."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PrivateAttr

from edgeship.calibration.errors import InputError
from edgeship.pipeline.compress_sections import Compress, Distill
from edgeship.pipeline.quantize_section import Quantize
from edgeship.pipeline.recipe_fields import Name, Place
from edgeship.pipeline.recipe_sections import (
    GATE_RANGES,
    GATES,
    Benchmark,
    Data,
    DataField,
    DeviceOptions,
    Golden,
    Input,
    Model,
    Parity,
    Release,
    TargetOptions,
)
from edgeship.pipeline.section import Section

if TYPE_CHECKING:
    from edgeship.calibration.samples.data import Preprocessing, Samples
    from edgeship.calibration.types import WeightScheme


INTEGER_MODES = ("static", "dynamic")
"""The modes in which kernels multiply 8-bit numbers."""
CALIBRATED_MODES = ("static", "int16")
"""The modes that choose ranges of activations on samples."""
INTEGER_WEIGHT_MODES = ("static", "int16", "dynamic")
"""The modes that write weights as 8-bit numbers."""
DATA_FILES = (".csv", ".npz", ".zip")


class Recipe(Section):
    """One deployment: a model, its data, how to quantize it, for which targets, and what is good enough."""

    name: Name = Field(description="letters, digits, . _ -")
    model: Model
    input: Input = Input()
    data: Data = Data()
    compress: Compress | None = Field(default=None, description="make it smaller first, with training")
    quantize: Quantize = Quantize()
    targets: dict[str, TargetOptions] = Field(min_length=1, description="one table per target")
    gates: dict[str, float] = Field(default_factory=dict, description="a gate nobody sets is not a gate")
    benchmark: Benchmark = Benchmark()
    device: Place = Field(default="host", description="where parity and latency are measured: as `--device`")
    devices: dict[str, DeviceOptions] = Field(default_factory=dict, description="one table per device")
    parity: Parity = Parity()
    golden: Golden = Golden()
    release: Release = Release()
    _path: Path = PrivateAttr(default=Path("recipe.toml"))
    _digests: dict[str, str | None] = PrivateAttr(default_factory=dict)
    _folders: dict[str, tuple[str, ...]] = PrivateAttr(default_factory=dict)

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
    def signing_key(self) -> Path | None:
        """The private key that signs the release: `release.key`, or else what the environment variable names."""
        from edgeship.pipeline.releasing.signature import KEY_VARIABLE

        if self.release.key is not None:
            return self.resolve(self.release.key, "release.key")
        given = os.environ.get(KEY_VARIABLE)
        return Path(given).absolute() if given else None

    @property
    def label_names(self) -> tuple[str, ...]:
        """The classes' names, in order: of `release.labels`, or else of `data.classes`; none without either.

        Raises InputError for a file that has none.
        """
        if self.release.labels is None:
            return self.class_names
        path = self.resolve(self.release.labels, "release.labels")
        try:
            names = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self.path.name}: release.labels: {path} cannot be read: {error}") from None
        if not names or not all(name.strip() for name in names):
            raise InputError(
                f"{self.path.name}: release.labels: {path} must have a name on every line, one for each class"
            )
        return tuple(names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes' names in the order of the model's outputs; none without `data.classes`. Raises InputError."""
        from edgeship.calibration.samples.image_list import read_classes

        if self.data.classes is None:
            return ()
        beside = self.resolve(self.data.classes, "data.classes")
        below = self.data_root / self._expand(self.data.classes, "data.classes")
        return read_classes(beside if beside.exists() or not below.exists() else below)

    @property
    def data_root(self) -> Path:
        """The folder that data files are relative to."""
        return self.resolve(self.data.root, "data.root")

    def data_path(self, field: DataField) -> Path | None:
        """The file or folder of `data.<field>`, beside the recipe or else under `data.root`; None when unset.

        A path may lead into a .zip. Raises InputError naming both places when it is in neither.
        """
        from edgeship.calibration.samples.file_tree import open_tree

        text: str | None = getattr(self.data, field)
        if text is None:
            return None
        places = [self.resolve(text, f"data.{field}"), self.data_root / self._expand(text, f"data.{field}")]
        for place in places:
            if place.is_file() and place.suffix.lower() not in DATA_FILES:
                raise InputError(
                    f"{self.path.name}: data.{field} = {text!r} is a file of another kind; "
                    f"accepted: a folder, {', '.join(DATA_FILES)}"
                )
            if place.exists() or open_tree(place) is not None:
                return place
        looked = " and ".join(str(place) for place in dict.fromkeys(places))
        raise InputError(f"{self.path.name}: data.{field} = {text!r} does not exist; looked for {looked}")

    def class_folders(self, field: DataField) -> tuple[str, ...]:
        """The sorted names of the class folders of `data.<field>`; none where there are none or a list has labels."""
        from edgeship.calibration.samples.image_list import class_folders

        if field not in self._folders:
            self._folders[field] = ()
            labelled = field == "evaluation" and self.data.labels is not None
            with contextlib.suppress(InputError):  # whoever opens the samples is told
                path = None if labelled else self.data_path(field)
                self._folders[field] = () if path is None else class_folders(path)
        return self._folders[field]

    def preprocessing(self, shape: Sequence[int] | None = None) -> Preprocessing:
        """How an image file becomes the model's input; `shape` is the model's own, used where the recipe has none.

        Raises InputError when neither gives a shape of four sides.
        """
        from edgeship.calibration.samples.data import Preprocessing

        sides = self.input.shape or shape
        if sides is None:
            raise InputError(f"{self.path.name}: input.shape is not set, and images need it; accepted: [1, C, H, W]")
        part = self.input
        whole = tuple(-1 if side == "dynamic" else int(side) for side in sides)
        if len(whole) != 4:
            raise InputError(f"{self.path.name}: images need an input of four sides, [1, C, H, W]; seen: {list(sides)}")
        return Preprocessing(
            shape=whole,
            mean=part.mean,
            std=part.std,
            resize=part.resize,
            crop=part.crop,
            color=part.color,
            interpolation=part.interpolation,
            antialias=part.antialias,
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
        samples, count = self._samples("evaluation", inputs), self._count("evaluation")
        return samples if count is None else samples.take(count, self.data.seed)

    def pixel_samples(self, field: DataField, inputs: Mapping[str, Sequence[int]]) -> Samples:
        """The samples of `data.<field>` without the preprocessing's last step: images as pixels, 0..255."""
        count = self._count(field)
        samples = self._samples(field, inputs, pixels=True)
        return samples if count is None else samples.take(count, self.data.seed)

    def _count(self, field: DataField) -> int | None:
        """How many samples are taken; None: all."""
        if field == "calibration":
            return self.quantize.samples
        return self.data.training_samples if field == "training" else self.data.evaluation_samples

    def data_digest(self, field: Literal["calibration", "evaluation", "training"]) -> str | None:
        """SHA-256 over the samples of `data.<field>` that are taken, and their preprocessing; None when unset."""
        if field not in self._digests:
            self._digests[field] = self._data_digest(field)
        return self._digests[field]

    def _data_digest(self, field: Literal["calibration", "evaluation", "training"]) -> str | None:
        from edgeship.pipeline.workspace import sha256_of

        path = self.data_path(field)
        if path is None:
            return None
        if path.suffix.lower() == ".npz" and path.is_file():  # which of its keys are inputs, only the model knows
            taken = f"{sha256_of(path)} {self._count(field)} {self.data.seed}"
            return hashlib.sha256(taken.encode()).hexdigest()
        stand_in = {} if self.input.shape else {"input": (1, 1 if self.input.color == "gray" else 3, -1, -1)}
        if field == "calibration":
            return self.calibration_samples(stand_in).digest()
        if field == "training":
            return self.pixel_samples(field, stand_in).digest()
        samples = self.evaluation_samples(stand_in)
        return None if samples is None else samples.digest()

    def _samples(
        self, field: DataField, inputs: Mapping[str, Sequence[int]] | None, *, pixels: bool = False
    ) -> Samples:
        from edgeship.calibration.samples.data import open_samples
        from edgeship.pipeline.class_order import class_order

        path = self.data_path(field)
        if path is None:
            raise InputError(f"{self.path.name}: data.{field} is not set")
        name = self.input.name or next(iter(inputs or ()), "input")
        is_arrays = path.suffix.lower() == ".npz" and path.is_file()
        preprocessing = None if is_arrays else self.preprocessing((inputs or {}).get(name))
        if preprocessing is not None and pixels:
            preprocessing = replace(preprocessing, mean=(0.0,), std=(1.0,))
        return open_samples(
            path,
            root=self.data_root,
            input_name=name,
            preprocessing=preprocessing,
            labels=self.data_path("labels") if field == "evaluation" else None,
            class_names=class_order(self, field),
            shapes=inputs,
        )

    def weight_scheme(self, target: str) -> WeightScheme:
        """Whether the artifact for `target` is made from full-range or pair-limited weights."""
        from edgeship.targets.base import load

        if self.quantize.mode not in INTEGER_MODES:
            return "full"  # no kernel adds products of 8 bits
        options = self.targets.get(target)
        if options and options.weights:
            return "full" if options.weights == "unsigned" else options.weights
        if self.quantize.weights == "auto":
            return load(target).weights
        return "pair_limited" if self.quantize.weights == "shared" else "full"

    def quantized_model(self, target: str) -> str:
        """The quantized model the target is made from: its name, without suffix, in the quantize stage's folder."""
        return target if self.has_own_form(target) else self.weight_scheme(target)

    def shipped_schemes(self) -> tuple[WeightScheme, ...]:
        """The weight schemes that an artifact is made from, sorted; a target with a form of its own asks for none."""
        own = [name for name in self.targets if self.has_own_form(name)]
        return tuple(sorted({self.weight_scheme(name) for name in self.targets if name not in own}))

    def has_own_form(self, target: str) -> bool:
        """Whether the target's quantized model is its own: of a form that no weight scheme says, or to be found out."""
        options = self.targets[target]
        asked = options.weights == "unsigned" or bool(options.keep_float)
        return self.quantize.mode in CALIBRATED_MODES and (asked or self.quantize.scheme == "auto")

    @property
    def qat_distill(self) -> tuple[str, Distill] | None:
        """The table that names the teacher of `quantize.qat.objective = "teacher"`, and what it says; None without."""
        settings = self.quantize.qat
        if settings is None or settings.objective != "teacher":
            return None
        if settings.distill is not None:
            return "quantize.qat.distill", settings.distill
        own = self.compress and self.compress.distill
        return ("compress.distill", own) if own else None

    def weight_schemes(self) -> tuple[WeightScheme, ...]:
        """The weight schemes that the recipe's targets need together, sorted; "full" is always among them."""
        return tuple(sorted({"full", *(self.weight_scheme(name) for name in self.targets)}))


def _split_factory(source: str) -> tuple[str, str | None]:
    place, colon, factory = source.rpartition(":")
    return (place, factory) if colon and factory.isidentifier() else (source, None)


def _bounds(gate: str) -> dict[str, float]:
    low, high = GATE_RANGES[gate]
    return {key: end for key, end in (("minimum", low), ("maximum", high)) if math.isfinite(end)}


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors and the generated reference."""
    schema = Recipe.model_json_schema()
    schema["properties"]["gates"]["properties"] = {
        name: {"type": "number", "description": text, **_bounds(name)} for name, text in GATES.items()
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
