"""int8 TFLite files of others, there and back: TFLite -> tf2onnx -> ONNX -> edgeship -> TFLite, integer for integer.

    python benchmarks/official_int8.py --tf2onnx PYTHON [--models small ...] [--data IMAGES] [FILE.tflite ...]

Without files, TensorFlow's own converter makes them first: Keras networks with seeded weights, calibrated on the images
(or on noise), full int8. PYTHON is an interpreter with tf2onnx (1.16 with onnx 1.17, numpy 1 and TensorFlow 2.15 was
tested: it does not install beside this project's onnx). Compared are all int8 constants with their scales, the number
of operators of each kind, and the outputs for random integers, under TFLite's own kernels and XNNPACK's; and, to tell
tf2onnx's faults from edgeship's, what ONNX Runtime makes of the ONNX file between them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeship.targets.base import ConvertOptions
from edgeship.targets.tflite import TARGET
from edgeship.targets.tflite.flatfile import load, operator_names

Array = np.ndarray[Any, np.dtype[Any]]
SAMPLES, RUNS = 8, 20
OPSET = "18"


def small() -> Any:
    """Every kind of layer that the converter quantizes, once."""
    from keras import Input, Model
    from keras import layers as k

    image = Input((32, 32, 3), batch_size=1)
    x = k.ReLU(6.0)(k.BatchNormalization()(k.Conv2D(8, 3, strides=2, padding="same")(image)))
    y = k.ReLU()(k.BatchNormalization()(k.DepthwiseConv2D(3, padding="same")(x)))
    x = k.Add()([x, k.Conv2D(8, 1)(y)])
    z = k.Conv2D(8, 3, padding="same", dilation_rate=2, activation="relu")(k.MaxPooling2D(2)(x))
    x = k.Concatenate()([z, k.AveragePooling2D(2)(x)])
    x = k.Conv2D(16, 3, strides=2)(k.ZeroPadding2D(((0, 1), (1, 0)))(x))
    x = k.UpSampling2D(2)(k.UpSampling2D(2, interpolation="bilinear")(k.LeakyReLU(negative_slope=0.1)(x)))
    x = k.Conv2DTranspose(8, 3, strides=2, padding="same")(x)
    gate = k.Conv2D(8, 1, activation="sigmoid")(k.GlobalAveragePooling2D(keepdims=True)(x))
    x = k.Activation("tanh")(k.Multiply()([x, gate]))
    x = k.Dense(24, activation="relu")(k.Flatten()(k.AveragePooling2D(4)(x)))
    return Model(image, k.Softmax()(k.Dense(10)(x)))


def activations() -> Any:
    """HardSwish, SiLU, PReLU, Subtract, Maximum, a separable convolution."""
    from keras import Input, Model
    from keras import layers as k

    image = Input((32, 32, 3), batch_size=1)
    x = k.Activation("hard_swish")(k.Conv2D(8, 3, strides=2, padding="same")(image))
    x = k.Activation("silu")(k.SeparableConv2D(16, 3, padding="same", activation="relu6")(x))
    a, b = k.Conv2D(8, 1)(x), k.Conv2D(8, 1)(x)
    x = k.PReLU(shared_axes=[1, 2])(k.Maximum()([k.Subtract()([a, b]), a]))
    return Model(image, k.Dense(5)(k.GlobalMaxPooling2D()(x)))


def application(name: str, **options: Any) -> Callable[[], Any]:
    """One of Keras' own networks, for images of 96 x 96, up to its logits: softmax over random ones has few values."""

    def build() -> Any:
        import keras

        side = (96, 96, 3)
        made = getattr(keras.applications, name)(
            weights=None, classes=10, input_shape=side, classifier_activation=None, **options
        )
        image = keras.Input(side, batch_size=1)
        return keras.Model(image, made(image))

    return build


MODELS: Mapping[str, Callable[[], Any]] = {
    "small": small,
    "activations": activations,
    "mobilenet": application("MobileNet", alpha=0.25),
    "mobilenet_v2": application("MobileNetV2", alpha=0.35),
    "mobilenet_v3": application("MobileNetV3Small", include_preprocessing=False),
    "efficientnet_b0": application("EfficientNetB0"),
    "resnet50": application("ResNet50"),
}


def images(folder: Path | None, side: int) -> Array:
    """SAMPLES images in [-1, 1], or noise."""
    if folder is None:
        return np.random.default_rng(0).normal(size=(SAMPLES, side, side, 3)).astype(np.float32)
    from PIL import Image

    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))[:SAMPLES]
    read = [np.asarray(Image.open(file).convert("RGB").resize((side, side)), np.float32) for file in files]
    return np.stack(read) / 127.5 - 1


def official(name: str, folder: Path, data: Path | None) -> Path:
    """The network as TensorFlow's converter writes it: full int8, integers in and out."""
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    model, rng = MODELS[name](), np.random.default_rng(0)
    samples = images(data, int(model.inputs[0].shape[1]))
    for weight in model.weights:
        if weight.name in ("bias", "beta"):
            weight.assign(rng.normal(size=weight.shape) * 0.3)
    for layer in model._flatten_layers():  # Keras has no public walk over nested layers
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    model(samples[:1], training=True)
    archive = keras.export.ExportArchive()
    archive.track(model)
    image = tf.TensorSpec(model.inputs[0].shape, tf.float32, "image")  # a free batch would become shape arithmetic
    archive.add_endpoint("serve", partial(model.__call__, training=False), [image])
    archive.write_out(str(folder / name), verbose=False)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(folder / name))
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([sample[None]] for sample in samples)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    path = folder / f"{name}.tflite"
    path.write_bytes(converter.convert())
    return path


def to_onnx(python: str, source: Path, folder: Path) -> Path:
    """What tf2onnx makes of the file. Raises SystemExit with its last words when it fails."""
    target = folder / f"{source.stem}.onnx"
    command = [python, "-m", "tf2onnx.convert", "--tflite", str(source), "--opset", OPSET, "--output", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not target.exists():
        raise RuntimeError(f"tf2onnx: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return target


def constants(path: Path) -> Counter[tuple[Any, ...]]:
    """The int8 constants: their integers in sorted order (layouts may differ) and their scales."""
    model = load(path)
    found: Counter[tuple[Any, ...]] = Counter()
    for tensor in model.subgraphs[0].tensors:
        data, quant = model.buffers[tensor.buffer].data, tensor.quantization
        if data is not None and len(data) and quant is not None and quant.scale is not None:
            integers = np.sort(np.asarray(data, np.uint8)).tobytes()
            found[integers, np.sort(np.float32(quant.scale)).tobytes()] += 1
    return found


def operators(path: Path) -> Counter[str]:
    """The number of operators of each kind."""
    model = load(path)
    names = operator_names(model)
    return Counter(names[operator.opcodeIndex] for operator in model.subgraphs[0].operators)


def outputs(path: Path, feeds: list[Array], delegated: bool) -> Array:
    """The integers that the interpreter computes."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    kind = OpResolverType.AUTO if delegated else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(str(path), experimental_op_resolver_type=kind, num_threads=1)
    interpreter.allocate_tensors()
    source, result = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    seen = []
    for feed in feeds:
        interpreter.set_tensor(source["index"], feed.reshape(source["shape"]))
        interpreter.invoke()
        seen.append(interpreter.get_tensor(result["index"]).reshape(-1))
    return np.stack(seen)


def computed_by_onnx(path: Path, feeds: list[Array]) -> Array:
    """The integers that the ONNX file means: what tf2onnx has lost or changed shows here."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.stack([session.run(None, {name: feed})[0].reshape(-1) for feed in feeds])


def _apart(name: str, expected: Array, seen: Array) -> str:
    apart = np.abs(expected.astype(int) - seen.astype(int))
    distinct = len(np.unique(expected))
    return f"{name}: {(apart > 0).sum()} of {apart.size} integers differ (max {apart.max()}, {distinct} values)"


def compare(source: Path, between: Path, back: Path) -> str:
    """One line: constants that are missing, operators that differ, and how far the integers are apart."""
    model = load(source)
    shape = model.subgraphs[0].tensors[model.subgraphs[0].inputs[0]].shape
    rng = np.random.default_rng(1)
    feeds = [rng.integers(-128, 128, shape).astype(np.int8) for _ in range(RUNS)]
    missing = sum((constants(source) - constants(back)).values())
    before, after = operators(source), operators(back)
    other = {kind: f"{before[kind]} -> {after[kind]}" for kind in sorted(before | after) if before[kind] != after[kind]}
    parts = [
        f"{sum(constants(source).values())} quantized constants, {missing} changed",
        f"operators {other or 'equal'}",
    ]
    for delegated in (False, True):
        kernels = "XNNPACK" if delegated else "builtin"
        parts.append(_apart(kernels, outputs(source, feeds, delegated), outputs(back, feeds, delegated)))
    parts.append(_apart("ONNX", outputs(source, feeds, False), computed_by_onnx(between, feeds)))
    return "; ".join(parts)


def main() -> None:
    """Prints a line per model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--tf2onnx", required=True, metavar="PYTHON")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--data", type=Path, help="a folder of images to calibrate on")
    arguments = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = arguments.files or [official(model, folder, arguments.data) for model in arguments.models]
        for source in sources:
            back = folder / f"{source.stem}.back.tflite"
            try:
                between = to_onnx(arguments.tf2onnx, source, folder)
                back.write_bytes(TARGET.convert(ir.load(between), ConvertOptions()))
                print(f"{source.stem}: {compare(source, between, back)}", flush=True)
            except RuntimeError as error:
                print(f"{source.stem}: not converted: {error}", flush=True)


if __name__ == "__main__":
    main()
