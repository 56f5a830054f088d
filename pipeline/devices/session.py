"""Returns an artifact on a device behind the Session protocol: it looks like one that runs here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType

import numpy as np

from edgeship.calibration.errors import InputError
from edgeship.calibration.types import Array, Session, TensorInfo
from edgeship.pipeline.devices.base import HOST, Device
from edgeship.pipeline.devices.worker import Subject, Worker
from edgeship.targets.base import BorderSession, load


def open_border(target: str, artifact: Path, device: Device) -> BorderSession:
    """The artifact opened here, for what its inputs and outputs mean.

    Raises InputError for an unusable file, or a target whose artifacts only its own Session can run.
    """
    session = load(target).open(artifact)
    if not isinstance(session, BorderSession):
        raise InputError(f"artifacts of target {target} cannot be run on {device.address}; accepted: host")
    return session


def open_on(device: Device, target: str, artifact: Path) -> AbstractContextManager[Session]:
    """The artifact's Session on a connected device, to be entered; this machine's own is one as well."""
    if device.address == HOST:
        return nullcontext(load(target).open(artifact))
    return DeviceSession(device, target, artifact)


class DeviceSession:
    """An artifact that a worker on a device runs; NCHW and float32 outside, as with any other Session.

    Used as a context manager: the worker ends with it.
    """

    def __init__(self, device: Device, target: str, artifact: Path, threads: int = 1) -> None:
        self._border = open_border(target, artifact, device)
        self._worker = Worker(device, Subject(target, artifact, threads))

    def __enter__(self) -> DeviceSession:
        self._worker.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.__exit__(kind, error, trace)

    @property
    def inputs(self) -> Sequence[TensorInfo]:
        """The inputs, as the caller sees them."""
        return self._border.inputs

    @property
    def outputs(self) -> Sequence[TensorInfo]:
        """The outputs, as the caller sees them."""
        return self._border.outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name for one batch. Raises InputError, StageError or DeviceError."""
        results = self._worker.run([np.asarray(values) for values in self._border.enter(feeds)])
        return self._border.leave(results)
