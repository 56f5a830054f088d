"""Two processes end with the weights of one, for the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from projects import TRAINABLE

HERE = Path(__file__).parent
PROGRAM = """
import sys
from pathlib import Path
import torch
from torch import nn
sys.path.insert(0, sys.argv[1])
from conftest import striped_images
from edgeship.pipeline.compression.batches import ArrayBatches, Augmentation
from edgeship.pipeline.compression.classification import Classification
from edgeship.pipeline.compression.loop import Run, make_accelerator, train
from edgeship.pipeline.training_section import Training

torch.manual_seed(1)
class Net(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
        )  # no bias before BatchNorm: its gradient is rounding noise, which AdamW makes steps of
        self.helper = nn.Linear(128, 4)  # as an auxiliary classifier: the loss asks for the first output alone

    def forward(self, x):
        for layer in list(self)[:7]:
            x = layer(x)
        return (self[7](x), self.helper(x)) if self.training else self[7](x)

net = Net()
images, labels = striped_images()
batch_size = int(sys.argv[5])
data = ArrayBatches(images, labels, batch_size, (100.0,), (60.0,), Augmentation(flip=True, shift=1))
settings = Training(epochs=2, ema=0.5, clip_norm=1.0, precision="float32", optimizer=sys.argv[3])
settings = settings.model_copy(update={"lr": float(sys.argv[4]), "mixup": 0.4, "cutmix": 1.0, "mix_share": 0.5})
history = train(Run(net, Classification(), data, settings, Path(sys.argv[2]), validation=data))
accelerator = make_accelerator()
if accelerator.is_main_process:
    state = {"weights": net.state_dict(), "loss": history[-1].loss, "top1": history[-1].validation_top1}
    torch.save({**state, "processes": accelerator.num_processes}, Path(sys.argv[2]) / "final.pt")
"""


MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))

    def forward(self, x):
        return torch.relu(x + self.two(self.one(x)))

def build():
    torch.manual_seed(3)
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    return nn.Sequential(stem, *(Block() for _ in range(3)), head)
"""
RECIPE = f"""{TRAINABLE}
[data]
training = "train.npz"
calibration = "train.npz"
evaluation = "train.npz"
[compress.prune]
kind = "mixed"
macs = 0.6
batches = 2
[compress.distill]
teacher.source = "model.py:build"
features = "hint"
[compress.training]
epochs = 1
batch_size = 16
lr = 0.005
precision = "float32"
[targets.onnxruntime]
[benchmark]
runs = 5
warmup = 1
"""


def launched(count: int, *program: str, home: Path) -> subprocess.CompletedProcess[str]:
    """What so many processes of one program printed. Without a GPU they are joined by gloo, on CPUs."""
    many = ["--multi_gpu", "--main_process_port", "0"] if count > 1 else []  # the option means several processes here
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no", *many]
    return subprocess.run(
        [*launch, "--num_processes", str(count), "--num_machines", "1", "--dynamo_backend", "no", *program],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(home)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_two_processes_of_the_command_give_the_network_of_one(striped: Callable[..., Any], tmp_path: Path) -> None:
    batch = next(iter(striped(batch_size=128, shuffle=False).epoch(0)))
    np.savez(tmp_path / "train.npz", image=batch.inputs.numpy(), label=batch.labels.numpy())
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    for count in (1, 2):
        command = ["-m", "edgeship.pipeline.cli", "compress", str(tmp_path / "recipe.toml")]
        done = launched(count, *command, "-o", str(tmp_path / str(count)), home=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("fewer)") == 1  # one of them tells
    one, two = (tmp_path / name for name in ("1", "2"))
    facts = json.loads((one / "compress.json").read_text())
    assert facts["blocks"]
    assert (one / "architecture.json").read_bytes() == (two / "architecture.json").read_bytes()
    found, same = (load_file(each / "weights.safetensors") for each in (one, two))
    assert found.keys() == same.keys()
    for name, value in found.items():
        torch.testing.assert_close(same[name], value, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("optimizer", "rate", "size"),
    [("sgd", 0.05, 5), ("muon", 0.005, 16)],  # of 5 samples one process has 2, the other 3
)
def test_two_processes_give_the_result_of_one(optimizer: str, rate: float, size: int, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    found = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        done = launched(count, str(program), str(HERE), str(folder), optimizer, str(rate), str(size), home=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(folder / "final.pt", weights_only=True))
    one, two = found
    assert (one["processes"], two["processes"]) == (1, 2)
    torch.testing.assert_close(two["loss"], one["loss"], rtol=1e-4, atol=1e-5)
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert two["top1"] == one["top1"]
