"""Returns this machine as a device: runners are child processes."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import TracebackType

from edgeship.calibration.errors import EdgeshipError, StageError
from edgeship.pipeline.devices.base import HOST, Launch


class HostDevice:
    """This machine: nothing is copied, and an idle runner is stopped so that its threads cannot spin."""

    address = HOST
    silence = 600.0

    def __enter__(self) -> HostDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing was put anywhere."""

    def push(self, artifact: Path) -> str:
        """The artifact where it is."""
        return str(artifact.absolute())

    def launch(self, target: str) -> Launch:
        """A child of this interpreter."""
        del target
        return Launch((sys.executable, "-m", "edgeship.pipeline.devices.host_worker"), True, _explain)


def _explain(code: int, said: str) -> EdgeshipError:
    how = f"of signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return StageError(f"its process died {how}{': ' + said if said else ''}")
