"""A small SiLU/HardSwish network for CIFAR-10, trained in minutes: what range algorithms are hardest on.

    python benchmarks/silu_cifar.py --data cifar10.zip --out FOLDER [--epochs 8] [--images 20000]

Inverted residual blocks with SiLU, then with HardSwish, squeeze-and-excitation in between, as EfficientNet and
MobileNetV3 have them. Writes weights.pt and recipe.toml, which `edgeship deploy` and `benchmarks/algorithms.py` take.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
RECIPE = """\
name = "silu_cifar"

[model]
source = "{module}:silu_cifar"
weights = "weights.pt"

[input]
name = "image"
shape = [1, 3, 32, 32]
mean = [123.675, 116.28, 103.53]
std = [58.395, 57.12, 57.375]

[data]
root = "{root}"
calibration = "{archive}/cifar10/train"
evaluation = "{archive}/cifar10/test"
evaluation_samples = 1000

[quantize]
samples = 100

[targets.onnxruntime]

[targets.tflite]
"""


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.up(nn.functional.silu(self.down(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(scale)


class Block(nn.Module):
    """An inverted residual with an activation of the given kind."""

    def __init__(self, inputs: int, outputs: int, stride: int, act: type[nn.Module], *, gate: bool) -> None:
        super().__init__()
        wide = 3 * inputs
        layers: list[nn.Module] = [nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), act()]
        layers += [nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), act()]
        layers += [Gate(wide)] if gate else []
        layers += [nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.body, self.same = nn.Sequential(*layers), stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.same else y


def silu_cifar() -> nn.Module:
    """The network with random weights."""
    plan = [(16, 24, 2, nn.SiLU, False), (24, 24, 1, nn.SiLU, True), (24, 40, 2, nn.Hardswish, False)]
    plan += [(40, 40, 1, nn.Hardswish, True), (40, 64, 2, nn.SiLU, True), (64, 64, 1, nn.Hardswish, False)]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU()]
    blocks = [Block(a, b, stride, act, gate=gate) for a, b, stride, act, gate in plan]
    head = [nn.Conv2d(64, 128, 1, bias=False), nn.BatchNorm2d(128), nn.Hardswish()]
    return nn.Sequential(*stem, *blocks, *head, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def images(archive: Path, part: str, count: int) -> tuple[Tensor, Tensor]:
    """As many of each class: normalised float32 (N, 3, 32, 32), and their classes."""
    with zipfile.ZipFile(archive) as file:
        found: dict[str, list[str]] = {}
        for name in sorted(file.namelist()):
            if f"/{part}/" in name and name.endswith((".jpg", ".png")):
                found.setdefault(name.split("/")[-2], []).append(name)
        taken = [(name, label) for label, key in enumerate(sorted(found)) for name in found[key][: count // len(found)]]
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(file.read(name))).convert("RGB")) for name, _ in taken])
    values = (pixels.astype(np.float32) - np.float32(MEAN)) / np.float32(STD)
    return torch.from_numpy(values.transpose(0, 3, 1, 2).copy()), torch.tensor([label for _, label in taken])


def train(data: Path, epochs: int, count: int) -> nn.Module:
    """The network after training with flips and shifts, one-cycle SGD, seed 0."""
    torch.manual_seed(0)
    x, y = images(data, "train", count)
    model, batch = silu_cifar(), 128
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps)
    start = time.monotonic()
    for epoch in range(epochs):
        order = torch.randperm(len(x))
        for places in order[: len(x) // batch * batch].split(batch):
            shift = [int(s) for s in torch.randint(-3, 4, (2,))]
            seen = torch.roll(x[places], shift, (2, 3))
            seen = seen.flip(3) if int(torch.randint(2, (1,))) else seen
            loss = nn.functional.cross_entropy(model(seen), y[places], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(
            f"epoch {epoch + 1} of {epochs}, {time.monotonic() - start:.0f} s, loss {loss.item():.3f}", file=sys.stderr
        )
    model.eval()
    x, y = images(data, "test", 1000)
    with torch.inference_mode():
        print(f"top-1 of 1000 test images: {float((model(x).argmax(1) == y).float().mean()):.1%}", file=sys.stderr)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="cifar10.zip with cifar10/train and cifar10/test")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, default=20_000)
    arguments = parser.parse_args()
    model = train(arguments.data, arguments.epochs, arguments.images)
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), arguments.out / "weights.pt")
    data = arguments.data.resolve()
    text = RECIPE.format(module=Path(__file__).resolve(), root=data.parent, archive=data.name)
    (arguments.out / "recipe.toml").write_text(text)


if __name__ == "__main__":
    main()
