"""What a device is: a machine where artifacts run, and how one is told from its address."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from edgeship.calibration.errors import EdgeshipError, InputError, nearest

if TYPE_CHECKING:
    from edgeship.pipeline.recipe_sections import DeviceOptions

HOST = "host"
ACCEPTED = "host, ssh://[user@]host[:port], adb:SERIAL, or the name of a [devices.NAME] table of the recipe"
_SSH = re.compile(
    r"ssh://(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9._-]*)@)?(?P<host>[A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])(?::(?P<port>\d{1,5}))?/?"
)
_ADB = re.compile(r"adb:(?P<serial>[A-Za-z0-9][A-Za-z0-9._:-]*)")


class DeviceError(EdgeshipError):
    """A device could not be reached, broke off, or lacks something; the artifact itself may be sound."""


@dataclass(frozen=True)
class Launch:
    """How a runner process is started: a command whose standard input and output are the runner's.

    `stops`: its signals reach the runner, so that it can be made to stand still. `explain` makes the error of a process
    that ended, from its exit code and the last thing it said on stderr.
    """

    command: Sequence[str]
    stops: bool
    explain: Callable[[int, str], EdgeshipError]


class Device(Protocol):
    """A machine where artifacts run, used as a context manager: on exit nothing of ours is left on it."""

    @property
    def address(self) -> str:
        """How messages and results call it."""

    @property
    def silence(self) -> float:
        """Seconds of silence after which it is given up."""

    def __enter__(self) -> Device:
        """Connects and makes ready. Raises DeviceError when it cannot be reached or lacks something."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Removes what was put there and disconnects."""

    def push(self, artifact: Path) -> str:
        """Where the artifact lies on the device, brought there if it was not."""

    def launch(self, target: str) -> Launch:
        """How to start a runner for an artifact of `target`."""


def open_device(address: str, named: Mapping[str, DeviceOptions] | None = None) -> Device:
    """The device at `address`, not yet connected; `named` are the recipe's.

    Raises InputError for an address that means nothing, saying what is accepted.
    """
    from edgeship.pipeline.devices.host import HostDevice
    from edgeship.pipeline.recipe_sections import DeviceOptions

    known = dict(named or {})
    if address not in known and not is_address(address):
        hint = nearest(address, known) if known else ""
        raise InputError(f"--device {address}: not a device; accepted: {ACCEPTED}{hint}")
    options = known[address] if address in known else DeviceOptions(url=address)
    if options.url == HOST:
        return HostDevice()
    if ssh := _SSH.fullmatch(options.url):
        return _ssh(ssh, options)
    if adb := _ADB.fullmatch(options.url):
        from edgeship.pipeline.devices.adb import AdbDevice

        return AdbDevice(adb["serial"], options)
    raise InputError(f"devices.{address}.url: {options.url!r} is no address; accepted: ssh://..., adb:SERIAL, host")


def _ssh(match: re.Match[str], options: DeviceOptions) -> Device:
    from edgeship.pipeline.devices.ssh import SshDevice

    port = int(match["port"]) if match["port"] else None
    if port is not None and not 0 < port < 65536:
        raise InputError(f"--device {options.url}: port {port}; accepted: 1..65535")
    return SshDevice(match["user"], match["host"].strip("[]"), port, options)


def is_address(text: str) -> bool:
    """Whether `text` is a device's address, as opposed to a name that a recipe may give one."""
    return text == HOST or bool(_SSH.fullmatch(text) or _ADB.fullmatch(text))
