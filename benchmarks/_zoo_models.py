"""Models of torchvision and timm as ONNX files: fixed random weights, BatchNorm statistics from real images, torch's
dynamo exporter.

Random weights are enough to judge a converter, as long as no layer is hidden: statistics that do not fit the images
make activations vanish or explode, and an initial value of zero or 1e-6 (heads, layer scales) hides what comes before
it.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _timm_models as timm
import numpy as np

from edgeship.calibration.samples.preprocessing import Preprocessing

OPSET = 20
SEED = 0
STATISTICS_IMAGES = 8
GAMMA, BETA = (0.75, 1.25), (1.0, 0.25)
"""BatchNorm's scale (uniform) and shift (normal: mean, deviation).

Around the usual initial shift of 0, random networks are chaotic: a difference grows in every layer (Yang et al., A Mean
Field Theory of Batch Normalization, 2019), and one rounding decides all logits of a MobileNetV2. No trained network is
like that. A shift of one deviation keeps most ReLUs open: noise of 1e-3 on the input then moves MobileNetV2's logits by
0.09 of their 255 steps instead of 1.7, and another image still moves them by 4 to 7.
"""
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

CLASSIFICATION = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet1_0",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x1_0",
    "squeezenet1_0",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11",
    "vgg11_bn",
    "vit_b_32",
    "wide_resnet50_2",
)
SEGMENTATION = (
    "deeplabv3_mobilenet_v3_large",
    "deeplabv3_resnet50",
    "fcn_resnet50",
    "lraspp_mobilenet_v3_large",
)
TORCHVISION = CLASSIFICATION + SEGMENTATION
MODELS = TORCHVISION + timm.MODELS
CONVOLUTIONAL = tuple(name for name in TORCHVISION if name not in ("maxvit_t", "swin_t", "swin_v2_t", "vit_b_32"))
"""Networks without attention: every layer of them has an int8 kernel."""
CHANNEL_SHUFFLES = {"shufflenet_v2_x1_0": 32}
"""Transposes that are what a network computes: two for each shuffle are the fastest form there is (one takes 2 to 6
times as long in LiteRT, GATHER and PACK over channels 4 to 12 times as long as one).
"""
_SIDES = {"inception_v3": 299, **timm.SIDES}
_NO_AUXILIARY: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
    **{name: {"weights_backbone": None} for name in SEGMENTATION},
}


def side(name: str) -> int:
    """The input's height and width in pixels: the one the family was published with, 224 for segmentation too."""
    return _SIDES.get(name, 224)


def preprocessing(name: str) -> Preprocessing:
    """ImageNet's usual preprocessing for the model's input."""
    size = side(name)
    return Preprocessing((1, 3, size, size), IMAGENET_MEAN, IMAGENET_STD, resize=(size, size))


def images(folder: Path, name: str, count: int, skip: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32 (count, 3, side, side): the folder's first images after `skip`, in the order of their names."""
    from PIL import Image

    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    chosen = files[skip : skip + count]
    if len(chosen) < count:
        raise SystemExit(f"{folder} has {len(files)} images; {skip + count} are needed")
    prepare = preprocessing(name)
    return np.stack([prepare.apply(Image.open(path)) for path in chosen])


def _import_models(site: str | None) -> Any:
    """torchvision.models, beside a torch whose build the wheel's binary extension does not fit.

    torchvision registers shape functions for operators that its extension would have declared. None of the models here
    calls one; declaring their names is enough for the import to succeed.
    """
    import torch

    if site:
        sys.path.append(site)
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "torchvision is not installed; --torchvision FOLDER takes the target of: pip install --no-deps torchvision"
        )
    registrations = (Path(spec.origin).parent / "_meta_registrations.py").read_text()
    wanted = set(re.findall(r'register_meta\("(\w+)"|torchvision::(\w+)', registrations))
    declared: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch is not typed
    for operator in sorted({first or second for first, second in wanted}):
        if not hasattr(torch.ops.torchvision, operator):
            declared.define(f"{operator}(Tensor input) -> Tensor")
    _import_models.declared = declared  # type: ignore[attr-defined]  # declarations live as long as their library object
    import torchvision

    return torchvision.models


def build(name: str, folder: Path, site: str | None) -> Any:
    """The torch module in evaluation mode, the same weights every time; its output is the logits or class maps."""
    import torch

    models = _import_models(site)
    torch.manual_seed(SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = {"weights": None, **_NO_AUXILIARY.get(name, {})}
        model = timm.create(name) if name in timm.MODELS else models.get_model(name, **arguments)
    model.eval()
    _reveal_layers(model)
    _measure_statistics(model, torch.from_numpy(images(folder, name, STATISTICS_IMAGES)))
    return _OnlyOutput(model) if name in SEGMENTATION else model


def _reveal_layers(model: Any) -> None:
    """Draws what initialization leaves constant: zero heads, tiny layer scales, and BatchNorm's scale and shift."""
    import torch
    from torch import nn

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2 and float(parameter.abs().max()) < 1e-5:
                if parameter.ndim == 2:
                    nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
                else:
                    nn.init.uniform_(parameter, 0.1, 1.0)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, *GAMMA)
                nn.init.normal_(module.bias, *BETA)


def _measure_statistics(model: Any, batch: Any) -> None:
    """Sets running means and variances to those of one batch, each layer seeing what the layers before really give."""
    import torch
    from torch import nn

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in norms:
        module.reset_running_stats()
        module.momentum = None
        module.train()
    with torch.no_grad():
        model(batch)
    model.eval()


def _OnlyOutput(model: Any) -> Any:  # noqa: N802 - makes a module class without importing torch with this file
    from torch import nn

    class OnlyOutput(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Any) -> Any:
            return self.model(x)["out"]

    return OnlyOutput().eval()


def export(name: str, folder: Path, path: Path, site: str | None) -> dict[str, Any]:
    """Writes the model's ONNX file; gives its largest difference from torch, relative to the output's range."""
    import onnxruntime
    import torch

    model = build(name, folder, site)
    batch = images(folder, name, 1, skip=STATISTICS_IMAGES)
    sample = torch.from_numpy(batch)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model(sample).numpy()
        program: Any = torch.onnx.export(
            model,
            (sample,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["input"],
            output_names=["output"],
            verbose=False,
        )
    partial = path.with_suffix(".partial")
    program.save(str(partial), external_data=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(partial), options, providers=["CPUExecutionProvider"])
    (seen,) = session.run(None, {"input": batch})
    relative = float(np.abs(seen - expected).max() / max(np.ptp(expected), 1e-12))
    if not relative < 1e-3:
        raise SystemExit(f"{name}: the exported model differs from torch by {relative:.2g} of the output's range")
    partial.rename(path)
    return {"relative": relative, "low": float(expected.min()), "high": float(expected.max())}


def selected(names: Sequence[str]) -> list[str]:
    """The models called `names`, or torchvision's; a name may be a prefix."""
    unknown = [name for name in names if not any(model.startswith(name) for model in MODELS)]
    if unknown:
        raise SystemExit(f"unknown models {', '.join(unknown)}; there are: {', '.join(MODELS)}")
    return [model for model in MODELS if any(model.startswith(name) for name in names or TORCHVISION)]
