"""Returns an Android device reached by the adb client, over USB or TCP.

Its shell must have a Python 3.9 with numpy and the runtime, which Android does not bring along: docs/devices.md says
how. The shell protocol (`adb shell -T`, Android 7 and newer) keeps output and exit codes apart; the runner's messages
are lines of ASCII, so that nothing on the way can change them.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeship.pipeline.devices.base import DeviceError
from edgeship.pipeline.devices.remote import RemoteDevice

if TYPE_CHECKING:
    from edgeship.pipeline.recipe_sections import DeviceOptions

_STATES = {
    "unauthorized": "it has not allowed this machine; confirm the question on its screen",
    "offline": "it is offline; unplug it and plug it in again, or adb reconnect",
    "recovery": "it is in recovery mode; start Android",
    "bootloader": "it is in its bootloader; start Android",
    "no permissions": "this user may not use it; see Android's udev rules",
}
_GONE = re.compile(r"device '.*' not found|no devices/emulators found|device offline|error: closed", re.IGNORECASE)


class AdbDevice(RemoteDevice):
    """The Android device with a serial, as `adb devices` lists it."""

    default_workdir = "/data/local/tmp"

    def __init__(self, serial: str, options: DeviceOptions) -> None:
        super().__init__(f"adb:{serial}", options)
        self._serial = serial

    def _connect(self) -> None:
        """Asks the adb server, which the client starts if need be, for the device's state."""
        listed = self._adb("devices")
        states = dict(line.split("\t", 1) for line in listed.splitlines() if "\t" in line)
        state = states.get(self._serial)
        if state is None:
            others = ", ".join(f"{serial} ({what})" for serial, what in sorted(states.items())) or "none"
            raise DeviceError(f"{self.address}: adb knows no device of this serial; there are: {others}")
        if state != "device":
            meaning = next((text for word, text in _STATES.items() if state.startswith(word)), f"its state is {state}")
            raise DeviceError(f"{self.address}: {meaning}")

    def _adb(self, word: str) -> str:
        try:
            done = subprocess.run(  # noqa: S603 - adb with one word of our own
                ["adb", word],  # noqa: S607 - found on PATH, where its users have it
                capture_output=True,
                text=True,
                timeout=self._options.timeout + 20,
                check=False,
            )
        except FileNotFoundError:
            raise DeviceError(f"{self.address}: adb (Android platform tools) is not installed here") from None
        except subprocess.TimeoutExpired:
            raise DeviceError(f"{self.address}: the adb server does not answer; try adb kill-server") from None
        if done.returncode:
            raise DeviceError(f"{self.address}: adb {word} failed: {' '.join(done.stderr.split())[-300:]}")
        return done.stdout

    def _disconnect(self) -> None:
        """The adb server is the user's, and stays."""

    def _shell(self, command: str) -> Sequence[str]:
        return ["adb", "-s", self._serial, "shell", "-T", command]

    def _lost(self, code: int, said: str) -> str | None:
        if code and _GONE.search(said):
            return f"the connection was lost (adb says: {' '.join(said.split())[-300:]})"
        return None
