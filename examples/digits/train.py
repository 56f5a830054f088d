"""Trains the digits network and writes weights.safetensors and the held-out images under data/.

    pip install scikit-learn safetensors torch pillow        # or: pip install -e .[torch,examples]
    python examples/digits/train.py                          # about a minute

The 1797 digits that scikit-learn ships are split once, by a fixed seed, stratified by class: 100 images to calibrate,
400 to evaluate, the rest to train. Training never sees the held-out images, neither for early stopping nor to choose an
epoch. The run is seeded and uses one thread: the same library versions on the same kind of CPU give the same weights.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from model import build
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

HERE = Path(__file__).parent
SIDE = 32  # [input] resize
MEAN, STD = 77.8, 95.8  # [input] mean and std: those of the training digits, on the scale 0..255
CALIBRATION, EVALUATION = 100, 400

log = logging.getLogger("train")


class Digits(NamedTuple):
    """8x8 grey images (n, 8, 8) uint8 with their classes (n,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def split(seed: int) -> tuple[Digits, Digits, Digits]:
    """The training, calibration and evaluation digits; no image is in two of them."""
    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    order = np.arange(len(images))
    train, held_out = train_test_split(
        order, test_size=CALIBRATION + EVALUATION, stratify=bunch.target, random_state=seed
    )
    calibration, evaluation = train_test_split(
        held_out, test_size=EVALUATION, stratify=bunch.target[held_out], random_state=seed
    )
    first, second, third = (Digits(images[part], bunch.target[part]) for part in (train, calibration, evaluation))
    return first, second, third


def prepare(images: NDArray[np.uint8]) -> Tensor:
    """The network's input (n, 1, 32, 32) float32: enlarged, normalized; what recipe.toml says under [input]."""
    enlarged = [Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR) for image in images]
    pixels = np.stack([np.asarray(image, np.float32) for image in enlarged])
    return torch.from_numpy((pixels - MEAN) / STD).unsqueeze(1)


def shifted(images: Tensor, generator: torch.Generator, most: int = 3) -> Tensor:
    """The batch moved by up to `most` pixels in each direction; the border is the background of the digits."""
    background = -MEAN / STD
    padded = nn.functional.pad(images, [most] * 4, value=background)
    down, right = (int(i) for i in torch.randint(0, 2 * most + 1, (2,), generator=generator))
    return padded[:, :, down : down + SIDE, right : right + SIDE]


def fit(model: nn.Module, digits: Digits, epochs: int, seed: int) -> None:
    """Trains in place: AdamW, one cycle of the learning rate, smoothed labels, random shifts."""
    images, labels = prepare(digits.images), torch.from_numpy(digits.labels)
    generator = torch.Generator().manual_seed(seed)
    batch = 64
    steps = len(images) // batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=epochs * steps)
    model.train()
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(images), generator=generator)
        total = 0.0
        for chosen in order[: steps * batch].split(batch):
            logits = model(shifted(images[chosen], generator))
            loss = nn.functional.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        log.info("epoch %2d of %d: loss %.4f", epoch, epochs, total / steps)


@torch.inference_mode()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """The share of right answers in percent."""
    model.eval()
    answers = model(prepare(digits.images)).argmax(1).numpy()
    return float(np.mean(answers == digits.labels) * 100)


def write_images(digits: Digits, folder: Path) -> None:
    """Replaces `folder` by one 8x8 PNG per digit, in a folder per class."""
    shutil.rmtree(folder, ignore_errors=True)
    for number, (image, label) in enumerate(zip(digits.images, digits.labels, strict=True)):
        path = folder / str(label) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, optimize=True)


def main() -> None:
    """Splits, trains, says how good the network is, and writes."""
    parser = argparse.ArgumentParser(description="Train the digits network.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for weights.safetensors and data/")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    train, calibration, evaluation = split(arguments.seed)
    model = build()
    fit(model, train, arguments.epochs, arguments.seed)
    log.info("training:    %.2f %% of %d", accuracy(model, train), len(train.labels))
    log.info("calibration: %.2f %% of %d", accuracy(model, calibration), len(calibration.labels))
    log.info("evaluation:  %.2f %% of %d", accuracy(model, evaluation), len(evaluation.labels))

    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), arguments.out / "weights.safetensors")
    write_images(calibration, arguments.out / "data" / "calibration")
    write_images(evaluation, arguments.out / "data" / "evaluation")
    log.info("written to %s", arguments.out)


if __name__ == "__main__":
    main()
