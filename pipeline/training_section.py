"""Returns the table of a recipe that says how a network is trained: by compression, fine-tuning, and QAT alike."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from edgeship.pipeline.section import Section


class Training(Section):
    """How long, with which optimizer and learning rates, and on which variations of the images."""

    epochs: PositiveInt = Field(default=5, description="passes over the training data")
    batch_size: PositiveInt = Field(default=128, description="samples of a step, over all processes together")
    optimizer: Literal["sgd", "adamw", "muon"] = Field(
        default="sgd",
        description="sgd and muon have momentum, adamw ignores it; muon: orthogonal steps of convolutions and linear "
        "layers, AdamW's for the rest",
    )
    lr: PositiveFloat = Field(
        default=0.02,
        description="the largest learning rate, reached after the warm-up; 0.002 with adamw and muon, if not given",
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of every optimizer but adamw")
    nesterov: bool = Field(default=True, description="Nesterov's momentum, of sgd")
    weight_decay: NonNegativeFloat = Field(
        default=1e-4, description="of weights with two or more axes; biases and normalization have none"
    )
    schedule: Literal["cosine", "step", "constant"] = Field(
        default="cosine", description="cosine: to zero at the end; step: times `step_factor` every `step_epochs`"
    )
    step_epochs: PositiveInt = Field(default=30, description="epochs between two steps of the schedule `step`")
    step_factor: float = Field(default=0.1, gt=0, le=1, description="what a step multiplies the learning rate with")
    warmup_epochs: NonNegativeFloat = Field(default=0.0, description="epochs in which the rate grows linearly to `lr`")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="share of the target spread over all classes")
    ema: float = Field(
        default=0.0, ge=0, lt=1, description="decay of an average of the weights that is kept instead of them; 0: none"
    )
    clip_norm: PositiveFloat | None = Field(default=None, description="largest norm of a step's gradient; no limit")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="of the forward pass; auto: bfloat16 on a GPU or CPU with instructions for it, float16 on other "
        "GPUs, float32 elsewhere",
    )
    cuda_graphs: bool = Field(
        default=False,
        description="on a GPU, in one process: launch the network's kernels all at once, several times as fast where "
        "layers are small; only for networks whose code decides nothing anew in each step (stochastic depth does)",
    )
    flip: bool = Field(default=False, description="mirror every other image, drawn at random")
    shift: NonNegativeInt = Field(default=0, description="move images by up to this many pixels, borders are black")
    mixup: NonNegativeFloat = Field(
        default=0.0,
        description="blend samples, and their labels, with others of the batch; their shares are drawn from Beta(this, "
        "this); 0: none",
    )
    cutmix: NonNegativeFloat = Field(
        default=0.0,
        description="put a box of another image of the batch into each, and as much of its label; the areas are drawn "
        "from Beta(this, this); 0: none",
    )
    mix_share: float = Field(
        default=1.0, gt=0, le=1, description="share of the samples that mixup or cutmix change; half by each with both"
    )
    seed: NonNegativeInt = Field(default=0, description="of the order of samples, their variations, and dropout")

    @property
    def mixes(self) -> bool:
        """Whether samples are mixed with others."""
        return bool(self.mixup or self.cutmix)

    @property
    def varies(self) -> bool:
        """Whether a sample looks different in each epoch."""
        return bool(self.flip or self.shift or self.mixes)

    @model_validator(mode="before")
    @classmethod
    def _rate_of_the_optimizer(cls, values: Any) -> Any:
        """AdamW and Muon move every element by a share of lr, whatever its gradient: SGD's would be far too large."""
        own = cls is Training and isinstance(values, dict) and values.get("optimizer") in ("adamw", "muon")
        return {"lr": 0.002, **values} if own else values

    @model_validator(mode="after")
    def _keys_fit_together(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs below epochs = {self.epochs}")
        if self.nesterov and self.optimizer == "sgd" and self.momentum == 0:
            raise ValueError("nesterov = false where momentum is 0")
        if self.mix_share != 1 and not self.mixes:
            raise ValueError("mixup or cutmix with mix_share, which says how many samples they change")
        return self
