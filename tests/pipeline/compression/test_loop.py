"""The training loop: it learns, ends where an uninterrupted run ends, and says what is wrong with its data."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeship.calibration.errors import InputError, StageError
from edgeship.pipeline.compression import loop
from edgeship.pipeline.compression.batches import ArrayBatches, Augmentation, Batch, LoaderBatches, Share
from edgeship.pipeline.compression.classification import Classification
from edgeship.pipeline.compression.loop import Hook, Run, make_accelerator, top1, train
from edgeship.pipeline.compression.metrics import FILE, plot_metrics
from edgeship.pipeline.compression.optimizer import learning_rate, make_optimizer
from edgeship.pipeline.training_section import Training

Make = Callable[..., Any]
SETTINGS = Training(epochs=3, batch_size=16, lr=0.05, ema=0.9, warmup_epochs=0.5, label_smoothing=0.1)
HERE = Path(__file__).parent


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Kill(Hook):
    """Ends the run after some steps as a power cut would: without a chance to write anything."""

    def __init__(self, after: int) -> None:
        self.left = after

    def step_done(self, model: nn.Module) -> None:
        self.left -= 1
        if self.left == 0:
            raise ConnectionAbortedError


class Terminate(Hook):
    """Sends SIGTERM to the process itself after some steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def step_done(self, model: nn.Module) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


class Loader:
    """A loader of a user's own: shuffles with torch, varies with NumPy and `random`."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.values = rng.normal(size=(48, 3, 8, 8)).astype(np.float32)
        self.labels = rng.integers(0, 4, 48)

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.randperm(48).split(16):
            noise = np.random.normal() + random.random()
            yield torch.from_numpy(self.values[chosen]) + noise, torch.from_numpy(self.labels[chosen])


def test_training_learns_and_averages(make_net: Make, striped: Make, tmp_path: Path) -> None:
    model, data = make_net(), striped(augmentation=Augmentation(flip=True))
    settings = SETTINGS.model_copy(update={"epochs": 6})
    history = train(Run(model, Classification(0.1), data, settings, tmp_path, validation=striped(shuffle=False)))
    assert len(history) == 6
    assert (history[-1].validation_top1 or 0) > 90  # chance: 25
    assert history[-1].loss < history[0].loss
    assert not model.training
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("cut_short", [(Kill, 11), (Terminate, 11), (Terminate, 8)], ids=str)
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    optimizer: str, cut_short: tuple[Callable[[int], Hook], int], make_net: Make, striped: Make, tmp_path: Path
) -> None:
    data = striped(augmentation=Augmentation(flip=True, shift=1))
    settings = SETTINGS.model_copy(update={"optimizer": optimizer})
    whole, cut = make_net(), make_net()
    kind, after = cut_short
    history = train(Run(whole, Classification(), data, settings, tmp_path / "whole", validation=data))
    with pytest.raises((ConnectionAbortedError, KeyboardInterrupt)):
        train(Run(cut, Classification(), data, settings, tmp_path / "cut", validation=data, hooks=[kind(after)]))
    resumed = make_net()
    assert train(Run(resumed, Classification(), data, settings, tmp_path / "cut", validation=data, hooks=[Hook()])) == (
        history
    )
    assert same(weights(resumed), weights(whole))
    assert (tmp_path / "cut" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


def test_a_run_with_a_loader_of_the_user_resumes_exactly(make_net: Make, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"epochs": 2})
    whole, cut = make_net(), make_net()

    def run(model: nn.Module, folder: str, *hooks: Hook) -> None:
        data = LoaderBatches(Loader(), "loaders", (1, 3, 8, 8))
        train(Run(model, Classification(), data, settings, tmp_path / folder, hooks=hooks or [Hook()]))

    run(whole, "whole")
    with pytest.raises(KeyboardInterrupt):
        run(cut, "cut", Terminate(5))
    run(cut, "cut")
    assert same(weights(whole), weights(cut))


def test_training_in_bfloat16_resumes_exactly_and_learns(make_net: Make, striped: Make, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"precision": "bfloat16"})
    whole, cut = make_net(), make_net()
    history = train(Run(whole, Classification(), striped(), settings, tmp_path / "whole"))
    assert history[-1].loss < 0.7 * history[0].loss
    with pytest.raises(KeyboardInterrupt):
        train(Run(cut, Classification(), striped(), settings, tmp_path / "cut", hooks=[Terminate(11)]))
    train(Run(cut, Classification(), striped(), settings, tmp_path / "cut", hooks=[Hook()]))
    assert same(weights(whole), weights(cut))
    assert all(each.dtype == torch.float32 for each in whole.parameters())


@pytest.mark.parametrize(
    ("has", "precision"),
    [
        ({"avx512_bf16": True}, "bf16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bf16"),
        ({"avx512_bf16": False, "avx512_f": True}, "no"),
        ({}, "no"),
    ],
)
def test_a_cpu_trains_in_half_precision_where_it_has_instructions_for_it(
    has: dict[str, bool], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert make_accelerator("auto").mixed_precision == precision


PROGRAM = """
import sys, time
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from conftest import striped_images
from edgeship.pipeline.compression.batches import ArrayBatches
from edgeship.pipeline.compression.classification import Classification
from edgeship.pipeline.compression.loop import Run, train
from edgeship.pipeline.training_section import Training
torch.manual_seed(1)
net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 4))
images, labels = striped_images()
def progress(done, total, what):
    print(done, flush=True)
    time.sleep(float(sys.argv[3]))
try:
    data = ArrayBatches(images, labels, 16, (100.0,), (60.0,))
    settings = Training(epochs=4, batch_size=16)
    train(Run(net, Classification(), data, settings, Path(sys.argv[2]), progress=progress))
except KeyboardInterrupt:
    sys.exit(130)
torch.save(net.state_dict(), Path(sys.argv[2]) / "final.pt")
"""


def test_a_terminated_process_keeps_its_state_and_the_next_one_goes_on(tmp_path: Path) -> None:
    def command(folder: str, pause: float) -> list[str]:
        (tmp_path / folder).mkdir(exist_ok=True)
        return [sys.executable, "-c", PROGRAM, str(HERE), str(tmp_path / folder), str(pause)]

    with subprocess.Popen(command("cut", 0.05), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "13":  # of 32, inside the second epoch
                process.send_signal(signal.SIGTERM)
                break
        last = int((process.stdout.read().split() or ["13"])[-1])
        assert process.wait(timeout=60) == 130
    assert last < 32
    done = subprocess.run(command("cut", 0), capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == str(last + 1)
    subprocess.run(command("whole", 0), capture_output=True, check=True)
    one, other = (torch.load(tmp_path / name / "final.pt", weights_only=True) for name in ("cut", "whole"))
    assert same(one, other)


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(
    make_net: Make, striped: Make, tmp_path: Path
) -> None:
    class Poisoned(Classification):
        calls = 0

        def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
            Poisoned.calls += 1
            loss, scores = super().__call__(model, batch)
            return (loss * float("nan") if Poisoned.calls == 12 else loss), scores

    started = time.monotonic()
    with pytest.raises(StageError, match=r"loss is nan at step 12 \(epoch 2, batch 4, .*kept in .*cut"):
        train(Run(make_net(), Poisoned(), striped(), SETTINGS, tmp_path / "cut"))
    kept = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)
    assert kept["position"]["epoch"] == 1
    assert all(torch.isfinite(value).all() for value in kept["model"].values())
    assert time.monotonic() - started < 60


class Sharp(torch.autograd.Function):
    """The identity with a slope of NaN, such as the square root of a square has at 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        return grads[0] * float("nan")  # type: ignore[no-any-return]  # torch leaves gradients untyped


@pytest.mark.parametrize("epoch", [1, 2])
def test_weights_that_are_no_numbers_are_never_kept(make_net: Make, striped: Make, tmp_path: Path, epoch: int) -> None:
    last = 8 * epoch  # the last step of the epoch: no loss is computed with what it leaves

    class Poisoned(Classification):
        calls = 0

        def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
            self.calls += 1
            loss, scores = super().__call__(model, batch)
            return Sharp.apply(loss) if self.calls == last else loss, scores

    rest = r"checkpoint of epoch 1 is kept" if epoch == 2 else r"no epoch of run was finished"
    wanted = rf"0\.weight, .*and \d+ more held NaN or infinities after step {last} \(epoch {epoch}, batch 8, .*{rest}"
    with pytest.raises(StageError, match=wanted):
        train(Run(make_net(), Poisoned(), striped(), SETTINGS, tmp_path / "run"))
    kept = tmp_path / "run" / "checkpoint.pt"
    assert kept.exists() == (epoch == 2)
    if epoch == 2:
        state = torch.load(kept, weights_only=True)
        assert state["position"]["epoch"] == 1
        assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_a_network_whose_scores_are_no_numbers_is_not_judged(make_net: Make, striped: Make) -> None:
    net = make_net()
    with torch.no_grad():
        net[-1].weight[0] = float("nan")
    with pytest.raises(StageError, match=r"scores are NaN for 128 of the 128 samples that judge it; accepted: numbers"):
        top1(net, striped())


def test_a_checkpoint_of_another_model_or_other_settings_is_refused(
    make_net: Make, striped: Make, tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"epochs": 1})
    train(Run(make_net(), Classification(), striped(), settings, tmp_path))
    with pytest.raises(InputError, match=r"of another model: \d+ tensors differ, such as 0\.weight \(\(8, 3, 3, 3\)"):
        train(Run(make_net(width=6), Classification(), striped(), settings, tmp_path))
    with pytest.raises(InputError, match=r"other settings: lr = 0\.05 instead of 0\.5"):
        train(Run(make_net(), Classification(), striped(), settings.model_copy(update={"lr": 0.5}), tmp_path))


def test_a_checkpoint_that_holds_code_is_not_run(make_net: Make, striped: Make, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"format": 1, "model": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="cannot be read"):
        train(Run(make_net(), Classification(), striped(), SETTINGS, tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "yields nothing"),
        ([(torch.zeros(4, 1, 8, 8), torch.zeros(4).long())], r"inputs of the shape \[4, 1, 8, 8\]; accepted: "),
        ([(torch.zeros(4, 3, 8, 8), torch.zeros(5).long())], r"labels are int64\[5\]; accepted: 4 whole numbers"),
        ([(torch.zeros(4, 3, 8, 8), torch.zeros(4))], r"labels are float32\[4\]"),
        ([(torch.zeros(4, 3, 8, 8), torch.full((4,), 7))], r"labels 7\.\.7; accepted: 0\.\.3"),
        ([("a", "b")], "a str; accepted: tensors or arrays"),
        ([(torch.zeros(4, 3, 8, 8),) * 3], "3 parts"),
        ([torch.zeros(4, 3, 8, 8)], "no labels"),
    ],
)
def test_a_loader_that_yields_the_wrong_things_is_told_so(
    batches: list[Any], message: str, make_net: Make, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        train(Run(make_net(), Classification(), LoaderBatches(batches, "loaders", (1, 3, 8, 8)), SETTINGS, tmp_path))


def test_a_generator_is_no_loader(make_net: Make) -> None:
    with pytest.raises(InputError, match="generator without a length"):
        LoaderBatches((item for item in [1]), "loaders", (1, 3, 8, 8))


def test_a_loader_whose_length_is_unknown_is_told_so() -> None:
    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]  # of anything
        def __iter__(self) -> Any:
            return iter([torch.zeros(3, 8, 8)])

    loader = torch.utils.data.DataLoader(Stream())
    with pytest.raises(InputError, match="data is a DataLoader without a length; accepted: a DataLoader, or a seq"):
        LoaderBatches(loader, "data", (1, 3, 8, 8))


class Broken(torch.utils.data.Dataset):  # type: ignore[type-arg]  # of anything
    def __len__(self) -> int:
        return 48

    def __getitem__(self, place: int) -> Any:
        if place == 40:
            raise ValueError("disk gone")
        return torch.zeros(3, 8, 8), place % 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_fails_is_named_with_the_batch_and_what_it_said(
    workers: int, make_net: Make, tmp_path: Path
) -> None:
    data = LoaderBatches(torch.utils.data.DataLoader(Broken(), 16, num_workers=workers), "own.py:data", (1, 3, 8, 8))
    wanted = (
        r"^own\.py:data, batch 3 of 3: the loader failed with ValueError: (?s:.*)disk gone; accepted: a loader that"
    )
    with pytest.raises(InputError, match=wanted) as error:
        train(Run(make_net(), Classification(), data, SETTINGS, tmp_path))
    assert "\n" not in str(error.value)
    assert isinstance(error.value.__cause__, ValueError)


def test_a_batch_that_has_no_sample_for_each_process_is_refused(
    make_net: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "share_of", lambda _accelerator: Share(1, 2))
    batches = [(torch.zeros(size, 3, 8, 8), torch.zeros(size).long()) for size in (4, 1)]
    wanted = "training, epoch 1, batch 2: a batch of 1 has no sample for each of 2 processes; accepted: batches of at"
    with pytest.raises(InputError, match=wanted):
        train(Run(make_net(), Classification(), LoaderBatches(batches, "own", (1, 3, 8, 8)), SETTINGS, tmp_path))


@pytest.mark.parametrize(("size", "count"), [(16, 2), (5, 2), (7, 3), (3, 3)])
def test_every_sample_of_a_batch_is_in_one_share(size: int, count: int) -> None:
    batch = Batch(torch.arange(size).float().view(-1, 1), torch.arange(size))
    shares = [batch.share(Share(place, count)) for place in range(count)]
    assert torch.equal(torch.cat([each.inputs for each in shares]), batch.inputs)
    assert [label for each in shares if each.labels is not None for label in each.labels.tolist()] == list(range(size))
    sizes = {len(each.inputs) for each in shares}
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_a_batch_of_one_that_batch_norm_cannot_take_is_named(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    batches = [(torch.zeros(size, 3, 8, 8), torch.zeros(size).long()) for size in (8, 1)]
    wanted = (
        "^training, epoch 1, batch 2: a batch of 1 has a single value in a channel .*accepted: batches of 2 samples"
    )
    with pytest.raises(InputError, match=wanted):
        train(Run(net, Classification(), LoaderBatches(batches, "own", (1, 3, 8, 8)), SETTINGS, tmp_path))


def test_a_network_that_raises_is_not_taken_for_a_batch_of_one(make_net: Make, striped: Make, tmp_path: Path) -> None:
    net = make_net()
    net.forward = Mock(side_effect=ValueError("expected 4D input"))
    with pytest.raises(ValueError, match="expected 4D input"):
        train(Run(net, Classification(), striped(), SETTINGS, tmp_path))


def test_an_epoch_sees_every_sample_once_in_an_order_of_its_own(striped: Make) -> None:
    data: ArrayBatches = striped()
    orders = [
        torch.cat([batch.indices for batch in data.epoch(number) if batch.indices is not None]) for number in (0, 1, 0)
    ]
    assert all(sorted(order.tolist()) == list(range(128)) for order in orders)
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])


def test_images_are_moved_and_mirrored_without_changing_their_pixels() -> None:
    images = torch.arange(16.0).view(1, 1, 4, 4).repeat(200, 1, 1, 1)
    varied = Augmentation(flip=True, shift=1, border=(-1.0,)).apply(images, torch.Generator().manual_seed(0))
    for mirrored in (images[0], images[0].flip(2)):
        assert any(torch.equal(each, mirrored) for each in varied)
    assert set(varied.unique().tolist()) == {-1.0, *map(float, range(16))}
    assert any(torch.equal(each[0, 1:, 1:], images[0, 0, :-1, :-1]) for each in varied)  # down and right


def test_what_is_no_image_cannot_be_mirrored_or_moved() -> None:
    for varied in (Augmentation(flip=True), Augmentation(shift=2)):
        with pytest.raises(InputError, match=r"flip and shift are for images .* shape is \[1, 8\]"):
            ArrayBatches(np.zeros((4, 8), np.float32), None, 2, augmentation=varied)


def test_learning_rates_follow_their_formulas() -> None:
    cosine = Training(epochs=10, lr=1.0, warmup_epochs=2.0)
    rates = [learning_rate(cosine, step, 5) for step in range(50)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert max(rates) == pytest.approx(1.0) == pytest.approx(rates[10])
    assert rates[30] == pytest.approx(0.5)  # half of the way after the warm-up
    stepped = Training(epochs=9, lr=1.0, schedule="step", step_epochs=3, step_factor=0.1)
    assert [learning_rate(stepped, epoch * 5, 5) for epoch in (0, 2, 3, 6)] == pytest.approx([1.0, 1.0, 0.1, 0.01])


def test_biases_and_normalization_are_not_decayed(make_net: Make) -> None:
    decayed, free = make_optimizer(make_net(), Training(weight_decay=0.1)).param_groups
    assert {each.dim() for each in decayed["params"]} == {2, 4}
    assert {each.dim() for each in free["params"]} == {1}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)


def test_the_plot_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    history = [{"loss": 1.0, "top1": 50.0, "validation_top1": None}, {"loss": 0.5, "top1": 70.0}]
    for name in ("one.png", "two.png"):
        plot_metrics(tmp_path / name, history)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert not (tmp_path / FILE).exists()
