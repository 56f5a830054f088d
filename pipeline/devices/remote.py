"""Returns what ssh and adb devices have in common: a folder over there, files pushed into it, a runner in it.

What is needed on the device: a POSIX shell with mkdir, cat, wc, rm and df, and a Python 3.9 with numpy and the runtime.
The runner is one file and is copied anew each time. The folder is removed by a shell over there that waits for the end
of its input: that end comes when we are done, and also when we were killed or the connection broke.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from edgeship.calibration.errors import EdgeshipError, InputError
from edgeship.pipeline.devices import runner
from edgeship.pipeline.devices.base import DeviceError, Launch

if TYPE_CHECKING:
    from edgeship.pipeline.recipe_sections import DeviceOptions

PUSH_SECONDS = 600.0
_FULL = re.compile(r"no space left|disk quota exceeded|not enough space", re.IGNORECASE)
_NO_PYTHON = re.compile(r"not found|no such file|inaccessible", re.IGNORECASE)
_NOT_FOUND = 127


class RemoteDevice(ABC):
    """A device behind a command line client; `_run` runs a shell command over there."""

    default_workdir = "/tmp"  # noqa: S108 - a folder of the device; what is made in it has a random name and mode 700

    def __init__(self, address: str, options: DeviceOptions) -> None:
        self.address = address
        self.silence = float(options.silence)
        self._options = options
        self._folder = ""
        self._pushed: dict[Path, str] = {}
        self._keeper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        parent = self._options.workdir or self.default_workdir
        folder = f"{parent.rstrip('/')}/edgeship-{secrets.token_hex(6)}"
        try:
            self._connect()
            self._command(f"umask 077 && mkdir {shlex.quote(folder)}", f"cannot make a folder in {parent}")
            self._folder = folder
            self._keeper = subprocess.Popen(  # noqa: S603 - the client of ssh or adb, no shell of ours
                list(self._shell(f"trap '' HUP; cat > /dev/null; rm -rf {shlex.quote(folder)}")),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                process_group=0 if os.name == "posix" else None,
            )
            self._write(Path(runner.__file__), f"{folder}/runner.py")
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def push(self, artifact: Path) -> str:
        """Where the artifact lies on the device, brought there if it was not. Raises DeviceError without room."""
        source = artifact.absolute()
        if source not in self._pushed:
            place = f"{self._folder}/{len(self._pushed)}{artifact.suffix}"
            self._write(source, place)
            self._pushed[source] = place
        return self._pushed[source]

    def launch(self, target: str) -> Launch:
        """A runner over there. Raises InputError for a target that the runner does not know."""
        if target not in runner.ENGINES:
            known = ", ".join(sorted(set(runner.ENGINES) - {"reference"}))
            raise InputError(f"artifacts of target {target} cannot be run on {self.address}; accepted: {known}")
        python = shlex.quote(self._options.python)
        # not exec: only a shell turns the signal that kills the runner into an exit code
        command = f"{python} -u {shlex.quote(self._folder)}/runner.py; exit $?"
        return Launch(self._shell(command), False, self._explain)

    @abstractmethod
    def _connect(self) -> None:
        """Raises DeviceError when the device cannot be reached."""

    @abstractmethod
    def _disconnect(self) -> None:
        """Ends what `_connect` began."""

    @abstractmethod
    def _shell(self, command: str) -> Sequence[str]:
        """The local command that runs `command` in the device's shell, its standard input and output untouched."""

    @abstractmethod
    def _lost(self, code: int, said: str) -> str | None:
        """What happened to the connection, in words, when the client ended with `code`; None when it was not that."""

    def _write(self, source: Path, place: str) -> None:
        """Copies a file there, whole or not at all."""
        content = source.read_bytes()
        what = f"cannot write {source.name} ({len(content)} bytes) to {place}"
        said = self._command(f"cat > {shlex.quote(place)} && wc -c < {shlex.quote(place)}", what, content)
        arrived = said.strip().split()[-1:] or ["nothing"]
        if arrived != [str(len(content))]:
            raise DeviceError(f"{self.address}: {what}: {arrived[0]} arrived")

    def _command(self, command: str, what: str, content: bytes = b"", seconds: float = PUSH_SECONDS) -> str:
        """What a shell command over there prints. Raises DeviceError saying `what` could not be done and why."""
        try:
            done = subprocess.run(  # noqa: S603 - the client of ssh or adb, no shell of ours
                list(self._shell(command)), input=content, capture_output=True, timeout=seconds, check=False
            )
        except FileNotFoundError as error:
            raise DeviceError(f"{self.address}: {error.filename} is not installed on this machine") from None
        except subprocess.TimeoutExpired:
            raise DeviceError(f"{self.address}: {what}: no answer within {seconds:.0f} s") from None
        if done.returncode:
            said = _last_line(done.stderr)
            lost = self._lost(done.returncode, done.stderr.decode(errors="replace"))
            raise DeviceError(f"{self.address}: {lost or self._reason(what, said, done.returncode)}")
        return done.stdout.decode(errors="replace")

    def _reason(self, what: str, said: str, code: int) -> str:
        if _FULL.search(said):
            return f"{what}: the device has no space left there{self._free()}; free some, or give another workdir"
        return f"{what}: {said or f'exit code {code}'}"

    def _free(self) -> str:
        """How much room there is, as the end of a clause; empty where the device does not tell."""
        folder = os.path.dirname(self._folder) or "/"  # noqa: PTH120 - a path of the device
        try:
            text = subprocess.run(  # noqa: S603 - as in `_command`
                list(self._shell(f"df -k {shlex.quote(folder)}")), capture_output=True, timeout=30, check=True
            ).stdout.decode(errors="replace")
            return f" ({int(text.splitlines()[-1].split()[-3])} KiB free)"
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            return ""

    def _explain(self, code: int, said: str) -> EdgeshipError:
        """The error of a runner that ended."""
        lost = self._lost(code, said)
        if lost:
            return DeviceError(lost)
        if code == _NOT_FOUND or (code == 126 and _NO_PYTHON.search(said)):
            return DeviceError(
                f"the device has no {self._options.python} (it said {said!r}); give [devices.NAME] python = ..., "
                "a Python 3.9 or newer with numpy and the runtime"
            )
        if "No module named 'numpy'" in said:
            return DeviceError(f"the device's {self._options.python} has no numpy; install it there: pip install numpy")
        if code in (137, -9):
            return DeviceError(f"its process was killed on the device, most likely for want of memory{_said(said)}")
        return DeviceError(f"its process ended with exit code {code}{_said(said)}")

    def _leave(self) -> None:
        """Has the folder over there removed and disconnects; a lost connection is no second error."""
        keeper, self._keeper, self._folder = self._keeper, None, ""
        if keeper is not None:
            try:
                keeper.communicate(timeout=30)  # the end of its input
            except subprocess.TimeoutExpired:
                keeper.kill()
                keeper.communicate()
        self._pushed.clear()
        self._disconnect()


def _said(text: str) -> str:
    return f": {text}" if text else ""


def _last_line(text: bytes) -> str:
    lines = [line.strip() for line in text.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""
