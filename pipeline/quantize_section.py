"""Returns the table of a recipe that says how the integers are chosen, `[quantize]`, and the tables in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from edgeship.pipeline.compress_sections import Distill
from edgeship.pipeline.recipe_fields import NonNegative, Positive, Range
from edgeship.pipeline.section import Section
from edgeship.pipeline.training_section import Training

if TYPE_CHECKING:
    from edgeship.calibration.learned.reconstruct_options import ReconstructOptions
    from edgeship.calibration.planning.overrides import Override
    from edgeship.pipeline.quantizing.limits import Limits

Share = Annotated[float, Field(ge=0, le=1)]


class QuantizeOverride(Section):
    """What single tensors or nodes get instead of what `[quantize]` says: exactly one wish."""

    pattern: str = Field(
        min_length=1,
        description="a glob of tensor names; with `float`, `int16` and `weight_algorithm`, of names of nodes and of "
        "layers' weights too",
    )
    algorithm: str | None = Field(default=None, description="the range algorithm for these tensors")
    weight_algorithm: str | None = Field(
        default=None, description="the range algorithm for these weights, by the name of the tensor or of its node"
    )
    stays_float: bool = Field(default=False, alias="float", description="true: what makes these tensors stays float")
    range: Range | None = Field(default=None, description="[low, high] to represent, with low <= 0 <= high")
    scale: Positive | None = Field(default=None, description="the quantization step itself")
    zero_point: int | None = Field(default=None, ge=-128, le=127, description="beside `scale`; 0 where not given")
    wide: bool = Field(default=False, alias="int16", description="true: 16-bit activations in and out of these nodes")

    @model_validator(mode="after")
    def _one_wish(self) -> Self:
        wishes = (self.algorithm, self.weight_algorithm, self.range, self.scale)
        if sum(wish is not None for wish in wishes) + self.stays_float + self.wide != 1:
            raise ValueError("exactly one of algorithm, weight_algorithm, float = true, range, scale and int16 = true")
        if self.zero_point is not None and self.scale is None:
            raise ValueError("zero_point beside scale only")
        return self

    def as_override(self) -> Override:
        """The same, as calibration takes it."""
        from edgeship.calibration.planning.overrides import Override

        return Override(
            self.pattern,
            self.algorithm,
            self.stays_float,
            self.range,
            self.scale,
            self.zero_point,
            self.wide,
            self.weight_algorithm,
        )


class Reconstruct(Section):
    """How `refine = ["reconstruct"]` looks for the integers that give back each float layer."""

    positions: PositiveInt = Field(default=512, description="output positions of each sample that are looked at")
    sweeps: PositiveInt = Field(default=4, description="rounds over a layer's weights, for each strength of the ridge")
    memory_mb: PositiveInt = Field(
        default=1024, description="for the samples' values; fewer samples are used where they do not fit"
    )
    seed: NonNegativeInt = Field(default=0, description="draws the positions")

    def as_options(self) -> ReconstructOptions:
        """The same, as calibration takes it."""
        from edgeship.calibration.learned.reconstruct_options import ReconstructOptions

        return ReconstructOptions(self.positions, self.sweeps, self.memory_mb, self.seed)


class Qat(Training):
    """Quantization-aware training of the quantized graph; the other keys are those of all training."""

    epochs: PositiveInt = Field(default=10, description="passes over the training data")
    batch_size: PositiveInt = Field(default=10, description="samples of a step, over all processes together")
    optimizer: Literal["sgd", "adamw"] = Field(default="adamw", description="sgd has momentum; adamw ignores it")
    lr: PositiveFloat = Field(
        default=0.01,
        description="the largest learning rate; weights are held in quantization steps, so adamw moves each by no more "
        "than about this share of its step at a time",
    )
    weight_decay: NonNegativeFloat = Field(default=0.0, description="of weights with two or more axes")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="float32", description="of the forward pass; half precision does not tell integers of the grid apart"
    )
    objective: Literal["distill", "labels", "teacher"] = Field(
        default="distill",
        description="distill: the float model's outputs, no labels needed; labels: the classes; teacher: a larger "
        "model's scores, as `distill` says, or without it [compress.distill]",
    )
    distill: Distill | None = Field(
        default=None,
        description="[quantize.qat.distill]: the teacher, for models that [compress] does not train; its scores, not "
        "its features",
    )
    data: Literal["calibration", "training"] = Field(
        default="calibration", description="what is trained on: the calibration samples, or data.training"
    )
    learn_scales: bool = Field(
        default=False, description="the scales of weights and activations are trained too (LSQ), within a factor of 4"
    )

    @model_validator(mode="after")
    def _scores_of_a_teacher(self) -> Self:
        if self.distill is None:
            return self
        if self.objective != "teacher":
            raise ValueError(f'no distill beside objective = "{self.objective}", which asks no teacher')
        if self.distill.features != "none":
            raise ValueError('distill.features = "none": a graph has no modules whose features could be matched')
        if self.distill.cache == "always":
            raise ValueError('distill.cache = "auto" or "never": here the teacher is asked about each batch')
        return self


class Quantize(Section):
    """How the integers are chosen."""

    mode: Literal["static", "dynamic", "float16", "int16", "none"] = Field(
        default="static",
        description="static: int8 weights and activations; dynamic: int8 weights, activations rounded at run time; "
        "float16: float16 weights; int16: int8 weights and 16-bit activations; none: the model stays float",
    )
    algorithm: str = Field(
        default="minmax", description="the range algorithm: a file of edgeship.calibration.algorithms"
    )
    weight_algorithm: str = Field(
        default="minmax",
        description="what chooses the ranges of weights: minmax (the largest magnitude), percentile, "
        "mse or entropy, for each scale by itself",
    )
    samples: PositiveInt = Field(default=100, description="calibration samples, drawn with `data.seed`")
    weights: Literal["auto", "shared", "full"] = Field(
        default="auto",
        description="auto: pair-limited where a target's CPUs would clip, full elsewhere; shared: pair-limited "
        "everywhere, so that all targets hold the same integers; full: nowhere (x86 without VNNI may clip)",
    )
    per_tensor: bool = Field(default=False, description="one weight scale per tensor instead of one per channel")
    refine: tuple[str, ...] = Field(
        default=("gptq", "bias_correction"),
        description="the refinements: files of edgeship.calibration.refine; [] for none",
    )
    fixes: tuple[Literal["float_outputs", "float_concats", "wide_activations", "wide_outputs"], ...] = Field(
        default=(), description="fixes of the structure that are accepted: what the findings on it propose"
    )
    scheme: Literal["default", "auto"] = Field(
        default="default",
        description="auto: for each target the fastest form on this machine that meets the gates: how weights are "
        "written, and which kinds of layers stay float",
    )
    sensitivity: bool = Field(default=False, description="measure what quantizing each layer costs by itself")
    max_drop: NonNegative | None = Field(
        default=None,
        description="the dearest layers go back to `revert` until the quantized model loses at most so many points of "
        "top-1 on the calibration samples (without labels: percent of other decisions)",
    )
    min_agreement: Share | None = Field(
        default=None,
        description="the same until at least this share of decisions, 0..1, is expected to be the float model's: by "
        "how far the calibration samples are from a decision's border, and by the noise; no labels needed",
    )
    min_sqnr: NonNegative | None = Field(
        default=None, description="the same until the outputs are so many dB above the noise"
    )
    revert: Literal["float", "int16"] = Field(
        default="float", description="what `max_drop`, `min_agreement` and `min_sqnr` put layers back to"
    )
    reconstruct: Reconstruct = Field(default_factory=Reconstruct, description="how layers are reconstructed")
    qat: Qat | None = Field(default=None, description="trains the quantized graph; without the table nothing does")
    override: tuple[QuantizeOverride, ...] = Field(
        default=(), description="[[quantize.override]] tables; the last that matches a tensor wins"
    )

    @property
    def limits(self) -> Limits:
        """What mixed precision is to meet."""
        from edgeship.pipeline.quantizing.limits import Limits

        return Limits(self.max_drop, self.min_agreement, self.min_sqnr)
