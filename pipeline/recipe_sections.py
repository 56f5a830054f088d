"""Returns the parts of a recipe: one class per table of the TOML file, each field with its meaning and default."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from edgeship.pipeline.recipe_fields import PerChannel, Place, Shape, Size
from edgeship.pipeline.section import Section

DataField = Literal["calibration", "evaluation", "labels", "training"]
GATES: Mapping[str, str] = {
    "accuracy.max_drop": "largest drop of top-1 against fp32, in percentage points",
    "accuracy.min_top1": "smallest top-1 of the artifact, in percent",
    "accuracy.min_agreement": "smallest share of samples decided as fp32 decides, 0..1; needs no labels",
    "accuracy.min_sqnr": "smallest signal to noise of any output against fp32, in dB; for models without classes",
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
GATE_RANGES: Mapping[str, tuple[float, float]] = {
    "accuracy.max_drop": (-100, 100),
    "accuracy.min_top1": (0, 100),
    "accuracy.min_agreement": (0, 1),
    "accuracy.min_sqnr": (-math.inf, math.inf),
    "parity.max_steps": (0, math.inf),
    "parity.mean_steps": (0, math.inf),
    "parity.min_agreement": (0, 1),
    "latency.min_speedup": (0, math.inf),
    "latency.max_median_ms": (0, math.inf),
    "size.max_bytes": (0, math.inf),
    "parity.max_saturated_layers": (0, math.inf),
    "int8_share.min": (0, 1),
}
"""What can be measured: a limit beyond it would always be met, or never."""
MOST_RUNS = 1_000_000


class Model(Section):
    """Where the trained model comes from."""

    source: Place = Field(description="PATH.py:factory, package.module:factory, or a model.onnx or model.pt2 file")
    weights: Place | None = Field(
        default=None, description="a state dict (.pt), a checkpoint with one in it, or a .safetensors file"
    )
    weights_key: str | None = Field(
        default=None, description='which state dict of a checkpoint with several, such as "model_ema"'
    )
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the factory")
    outputs: Literal["auto", "classes", "values"] = Field(
        default="auto",
        description="classes: scores, of which the largest decides; values: embeddings, poses, pictures, where classes "
        "of samples mean nothing; auto: values where the output has length 1, else classes",
    )


class Input(Section):
    """The model's input tensor and how an image becomes one."""

    name: str | None = Field(default=None, description="the input's name; the exporter's when not given")
    shape: Shape | None = Field(
        default=None,
        description='batch first, NCHW (NHWC if the model has it so); the batch may be "dynamic"; an ONNX file\'s own',
    )
    others: dict[str, Shape] = Field(
        default_factory=dict,
        description="further inputs and their shapes, such as { state = [1, 16] }: arguments of a PyTorch module, by "
        "name, or sizes that an ONNX file leaves open; samples are then an .npz with a key for each input",
    )
    mean: PerChannel = Field(default=(0.0,), description="subtracted from each pixel (0..255), per channel")
    std: PerChannel = Field(default=(1.0,), description="divides each pixel after the mean is subtracted, per channel")
    resize: Size | None = Field(default=None, description="the shorter side, or [height, width]")
    crop: Size | None = Field(default=None, description="centre crop after resizing")
    interpolation: Literal["bilinear", "bicubic", "lanczos", "nearest"] = Field(
        default="bilinear", description="how images are resized: Pillow's, which torchvision uses"
    )
    antialias: bool = Field(
        default=True, description="false: bilinear without antialiasing, as OpenCV and tf.image.resize do it"
    )
    color: Literal["rgb", "bgr", "gray"] = Field(
        default="rgb", description="the channel order the model was trained with"
    )
    dtype: Literal["float32"] = Field(default="float32", description="the type of the float model's input")


class Data(Section):
    """Real samples: to choose ranges with, and to judge the artifact with."""

    root: Place = Field(default=".", description="the folder that file names in the lists are relative to")
    calibration: Place | None = Field(default=None, description="a CSV (file[,label]), a folder of images, or an .npz")
    evaluation: Place | None = Field(default=None, description="the same kinds; other samples than the calibration's")
    training: Place | None = Field(default=None, description="the same kinds, with classes: to train on")
    training_samples: PositiveInt | None = Field(default=None, description="train on this many, drawn with `seed`; all")
    loaders: Place | None = Field(
        default=None,
        description="PATH.py:function in place of `training`: returns a loader of batches (inputs, labels), or two, "
        "the second of which is held out; it makes batches, preprocesses and varies images itself",
    )
    loader_files: tuple[Place, ...] = Field(
        default=(),
        description="files and folders that `loaders` reads: when they change, training starts anew. Nothing else "
        "tells that they did",
    )
    evaluation_samples: PositiveInt | None = Field(
        default=None, description="judge with this many, drawn with `seed`; all"
    )
    classes: Place | None = Field(
        default=None,
        description="a text file with the names of the class folders, or of the labels in a CSV, a line for each, in "
        "the order of the model's outputs; the sorted names of the folders, of `training` where it is trained on",
    )
    labels: Place | None = Field(
        default=None, description="a CSV (file,label) that says the classes of evaluation images"
    )
    seed: NonNegativeInt = Field(default=0, description="draws samples where fewer than all are used")


class TargetOptions(Section):
    """What one target's artifact looks like; the target's own habit where nothing is said."""

    weights: Literal["full", "pair_limited", "unsigned"] | None = Field(
        default=None, description="overrides quantize.weights here; unsigned: uint8 weights, exact on every CPU"
    )
    keep_float: tuple[Literal["depthwise", "pointwise", "conv", "conv_transpose", "matmul"], ...] = Field(
        default=(), description="kinds of layers that run in float here"
    )
    io_layout: Literal["nchw", "nhwc"] | None = Field(default=None, description="the artifact's image layout")
    io_dtype: Literal["float32", "int8", "uint8"] = Field(
        default="float32", description="the artifact's input and output type"
    )
    integer_only: bool | None = Field(
        default=None,
        description="integer kernels wherever the runtime has one, for hardware without floating point; CPUs compute "
        "some operators faster in real numbers between the same integers. Not given: where inputs or outputs are "
        "integers, and in models that came out of a TFLite file (tflite only)",
    )
    c_array: bool = Field(
        default=False, description='also as C source for TensorFlow Lite Micro; needs io_dtype = "int8" (tflite only)'
    )


class Release(Section):
    """What a release says of itself, and who signs it."""

    version: str | None = Field(default=None, description="the model's version, such as 1.2.0")
    title: str | None = Field(default=None, description="what the model is called in its card; the recipe's name")
    description: str | None = Field(default=None, description="what the model does, in a sentence or two")
    author: str | None = Field(default=None, description="who made the model")
    license: str | None = Field(default=None, description="the model's licence: an SPDX expression, such as Apache-2.0")
    labels: Place | None = Field(
        default=None,
        description="a text file with a line for each class, for the artifacts' metadata and the card; `data.classes`",
    )
    key: Place | None = Field(
        default=None,
        description="a private key (PEM, P-256, P-384 or P-521) that signs the release; it is read, never copied. The "
        "environment variable EDGESHIP_SIGNING_KEY and --sign say the same",
    )


class Benchmark(Section):
    """How latency is measured."""

    threads: PositiveInt = Field(default=1, description="threads of each runtime")
    sweep: tuple[PositiveInt, ...] = Field(
        default=(), description="further numbers of threads to measure the artifacts with, such as [2, 4]"
    )
    runs: PositiveInt = Field(default=200, le=MOST_RUNS, description="timed inferences of each artifact")
    warmup: NonNegativeInt = Field(default=20, le=MOST_RUNS, description="the fewest inferences before the timed ones")
    launches: PositiveInt = Field(
        default=5, le=100, description="fresh processes that the inferences are spread over, 20 or more in each"
    )
    profile: bool = Field(default=True, description="also the time of each operator, when on this machine")


class DeviceOptions(Section):
    """Another machine, where parity and latency can be measured with `--device NAME`."""

    url: Place = Field(description="ssh://[user@]host[:port], adb:SERIAL, or host")
    python: Place = Field(
        default="python3", description="the device's Python, 3.9 or newer, with numpy and the runtime"
    )
    workdir: str = Field(
        default="", description="a folder of the device that can be written; /tmp, with adb /data/local/tmp"
    )
    identity: Place | None = Field(default=None, description="the private key file for ssh; ssh's own choice")
    known_hosts: Place | None = Field(default=None, description="the file with the host's key; ssh's own")
    timeout: PositiveInt = Field(default=10, description="seconds to connect")
    silence: PositiveInt = Field(default=300, description="seconds without an answer after which a device is given up")


class Parity(Section):
    """How the artifacts are compared with the quantized reference."""

    samples: PositiveInt = Field(default=100, description="evaluation samples to compare on, drawn with `data.seed`")
    layers: NonNegativeInt = Field(
        default=0, description="compare layer by layer too, on this many of them; takes seconds for each"
    )


class Golden(Section):
    """The inputs and outputs recorded at export, against which every later model is checked."""

    samples: PositiveInt = Field(default=4, description="how many are recorded")
