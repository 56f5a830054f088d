"""Returns the tables of a recipe that say how a network is made smaller: `[compress]` and its parts."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from edgeship.pipeline.section import Section
from edgeship.pipeline.training_section import Training

Importance = Literal["magnitude", "taylor", "activation", "apoz"]
"""What a weight or channel can be ranked by."""
GOALS = ("ratio", "macs", "max_bytes", "max_latency_ms")
"""The keys that say how much is removed, of which one is set."""


class Prune(Section):
    """What is removed, how much of it, and in how many steps with training in between."""

    kind: Literal["structured", "blocks", "mixed", "soft", "unstructured"] = Field(
        default="structured",
        description="structured: whole channels, for real; blocks: whole residual blocks; mixed: both, whichever costs "
        "the least loss for what it saves; soft: channels are zeroed each epoch, trained on, and removed at the end; "
        "unstructured: single weights become zero (smaller when compressed, not faster)",
    )
    importance: Literal["auto", Importance] = Field(
        default="auto",
        description="what a weight or channel is ranked by; auto: taylor with `structured` and `mixed`, magnitude with "
        "the others; blocks are ranked by the loss without them",
    )
    scope: Literal["global", "layer"] = Field(
        default="global", description="rank all layers together, or take the same share of each layer"
    )
    ratio: float | None = Field(
        default=None, gt=0, lt=1, description="share of the channels, blocks or weights to remove"
    )
    macs: float | None = Field(default=None, gt=0, lt=1, description="share of the multiply-accumulates to keep")
    max_bytes: PositiveInt | None = Field(default=None, description="largest size of the float32 weights")
    max_latency_ms: PositiveFloat | None = Field(
        default=None, description="largest median latency of the float artifact of `latency_target`, measured here"
    )
    latency_target: str = Field(default="onnxruntime", description="the target whose runtime `max_latency_ms` is for")
    steps: PositiveInt = Field(default=1, description="prune in this many steps, training `step_epochs` between them")
    step_epochs: PositiveInt = Field(default=1, description="epochs of training after each step but the last")
    fade_epochs: NonNegativeInt = Field(
        default=0,
        description="of the training's epochs, the first over which what is removed goes little by little: blocks and "
        "channels fade out, single weights become zero by a cubic schedule; 0: all at once",
    )
    round_to: PositiveInt = Field(default=8, description="channels are kept in multiples of this, as kernels want them")
    layer_limit: float = Field(default=0.9, gt=0, lt=1, description="largest share removed from any one layer")
    batches: PositiveInt = Field(
        default=16, description="training batches that gradients, activations or losses come from"
    )
    skip: tuple[str, ...] = Field(default=(), description="globs of names of layers or blocks that stay as they are")

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        goals = [name for name in GOALS if getattr(self, name) is not None]
        if len(goals) != 1:
            raise ValueError("exactly one of ratio, macs, max_bytes and max_latency_ms")
        if self.kind in ("soft", "unstructured") and goals != ["ratio"]:
            raise ValueError(f'ratio with kind = "{self.kind}": {goals[0]} is reached by removing channels or blocks')
        if self.kind == "blocks" and self.importance != "auto":
            raise ValueError('importance = "auto" with kind = "blocks", which are ranked by the loss without them')
        if self.kind == "mixed" and goals == ["ratio"]:
            raise ValueError(
                'macs, max_bytes or max_latency_ms with kind = "mixed": a ratio of blocks and channels is none'
            )
        if self.kind == "mixed" and self.scope == "layer":
            raise ValueError('scope = "global" with kind = "mixed", which takes what costs the least anywhere')
        if self.kind == "soft" and self.ranked_by != "magnitude":
            raise ValueError('importance = "magnitude" with kind = "soft", which ranks anew after each epoch')
        if self.kind == "soft" and self.steps != 1:
            raise ValueError('steps = 1 with kind = "soft", which prunes in every epoch')
        if self.kind == "unstructured" and self.importance == "apoz":
            raise ValueError('importance = "magnitude", "taylor" or "activation" with kind = "unstructured"')
        return self

    @model_validator(mode="after")
    def _one_way_of_going_gradually(self) -> Self:
        if self.fade_epochs and (self.kind == "soft" or self.steps != 1):
            seen = 'kind = "soft"' if self.kind == "soft" else f"steps = {self.steps}"
            raise ValueError(f"fade_epochs = 0 with {seen}, which is another way of removing little by little")
        if self.fade_epochs and self.kind == "unstructured" and self.ranked_by != "magnitude":
            raise ValueError('importance = "magnitude" with fade_epochs: weights are ranked anew as they go')
        return self

    @property
    def goal(self) -> str:
        """The key that says how much is removed."""
        return next(name for name in GOALS if getattr(self, name) is not None)

    @property
    def ranked_by(self) -> Importance:
        """What `importance` means for this kind of pruning."""
        if self.importance != "auto":
            return self.importance
        return "taylor" if self.kind in ("structured", "mixed") else "magnitude"


class Teacher(Section):
    """The model that is learned from; the input's shape and preprocessing are the student's."""

    source: str = Field(min_length=1, description="PATH.py:factory, package.module:factory, model.onnx or model.pt2")
    weights: str | None = Field(default=None, description="a state dict: .safetensors, or torch's format")
    weights_key: str | None = Field(default=None, description="which state dict of a checkpoint with several")
    args: dict[str, Any] = Field(default_factory=dict, description="arguments of the factory")


class Distill(Section):
    """Learning from a teacher's outputs, and from what it computes on the way."""

    teacher: Teacher
    weight: float = Field(default=0.7, ge=0, le=1, description="of the teacher's soft targets; the rest is the labels'")
    temperature: PositiveFloat = Field(default=4.0, description="softens both models' outputs")
    features: Literal["none", "attention", "hint"] = Field(
        default="none",
        description="attention: where the channels' energy lies (any widths); hint: the features themselves, through "
        "a trained 1x1 convolution",
    )
    feature_weight: NonNegativeFloat = Field(default=100.0, description="of the feature loss")
    layers: tuple[tuple[str, str], ...] = Field(
        default=(),
        description="pairs [student's module, teacher's module] that are matched; without: the end of each residual "
        "block, where the student is cut out of a network like its teacher",
    )
    mirror: bool = Field(
        default=False,
        description="the teacher's scores are the mean of those of an image and its mirror image, which are right more "
        "often than either; takes a second pass of the teacher",
    )
    cache: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="keep the teacher's outputs for each sample: auto: where images are not varied; always: those of "
        "the unvaried image, also for its variations",
    )

    @model_validator(mode="after")
    def _features_have_layers(self) -> Self:
        if self.features == "none" and self.layers:
            raise ValueError('no layers, or features = "attention" or "hint"')
        if self.features != "none" and self.cache == "always":
            raise ValueError('cache = "auto" or "never" with features: they are computed, not kept')
        return self


class Compress(Section):
    """Making the network smaller while it can still be trained; without this table the stage does nothing."""

    prune: Prune | None = Field(default=None, description="[compress.prune]; nothing is removed without it")
    distill: Distill | None = Field(default=None, description="[compress.distill]; no teacher without it")
    training: Training = Field(default=Training(), description="[compress.training]: after pruning, or all there is")

    @model_validator(mode="after")
    def _fades_in_time(self) -> Self:
        if self.prune is not None and self.prune.fade_epochs >= self.training.epochs:
            raise ValueError(
                f"prune.fade_epochs below training.epochs = {self.training.epochs}, so that some training follows; "
                f"it is {self.prune.fade_epochs}"
            )
        return self

    @model_validator(mode="after")
    def _kept_answers_are_of_single_samples(self) -> Self:
        if self.distill is not None and self.distill.cache == "always" and self.training.mixes:
            raise ValueError('distill.cache = "auto" or "never" with training.mixup or cutmix: a mixed image is new')
        return self

    @model_validator(mode="after")
    def _soft_without_average(self) -> Self:
        if self.prune is not None and self.prune.kind == "soft" and self.training.ema:
            raise ValueError('training.ema = 0 with prune.kind = "soft": an average of zeroed channels is not zero')
        return self
