"""Returns a Linux device reached by the system's ssh client: its keys, agents, jump hosts and ~/.ssh/config all count.

One connection is made and shared (ControlMaster); nothing ever asks for a password or a host key (BatchMode).
"""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeship.pipeline.devices.base import DeviceError
from edgeship.pipeline.devices.remote import RemoteDevice

if TYPE_CHECKING:
    from edgeship.pipeline.recipe_sections import DeviceOptions

LOST = 255
"""The client's own exit code; every other one is the remote command's (ssh(1), EXIT STATUS)."""
ALIVE_SECONDS = 5
PERSIST_SECONDS = 60
"""How long the shared connection outlives its last user: nothing stays when this process is killed."""
_KNOWN = (
    (r"host key verification failed|remote host identification has changed", "its host key is not the known one; check "
     "it, then ssh-keyscan -p PORT HOST >> ~/.ssh/known_hosts, or give [devices.NAME] known_hosts"),
    (r"permission denied", "it refuses the login; accepted: a key that it knows (ssh-copy-id, ssh-agent, or "
     "the recipe's [devices.NAME] identity)"),
    (r"could not resolve hostname|name or service not known", "there is no host of this name"),
    (r"connection refused", "nothing answers on its ssh port"),
    (r"no route to host|network is unreachable", "there is no way to it in this network"),
    (r"timed out|not responding", "it does not answer in time"),
    (r"broken pipe|closed by remote|connection reset|closed\.?$|client_loop|mux_client", "the connection was lost"),
)  # fmt: skip


class SshDevice(RemoteDevice):
    """A machine that sshd runs on."""

    def __init__(self, user: str | None, host: str, port: int | None, options: DeviceOptions) -> None:
        """`user` and `port` None: as ~/.ssh/config says."""
        place = f"[{host}]" if ":" in host else host
        super().__init__(f"ssh://{f'{user}@' if user else ''}{place}{f':{port}' if port else ''}", options)
        self._host, self._user, self._port = host, user, port
        self._control = ""
        self._client: list[str] = []

    def _words(self) -> list[str]:
        """The client's command line before the host."""
        options = self._options
        words = {
            "BatchMode": "yes",
            "ConnectTimeout": str(options.timeout),
            "ServerAliveInterval": str(ALIVE_SECONDS),
            "ServerAliveCountMax": "3",
            "StrictHostKeyChecking": "yes",
            "ControlPath": f"{self._control}/%C",
            "LogLevel": "ERROR",
        }
        if options.known_hosts:
            words["UserKnownHostsFile"] = str(Path(options.known_hosts).expanduser())
        if options.identity:
            words |= {"IdentityFile": str(Path(options.identity).expanduser()), "IdentitiesOnly": "yes"}
        chosen = [word for key, value in words.items() for word in ("-o", f"{key}={value}")]
        port = ["-p", str(self._port)] if self._port else []
        return ["ssh", "-T", *chosen, *port, *(["-l", self._user] if self._user else [])]

    def _connect(self) -> None:
        self._control = tempfile.mkdtemp(prefix="edgeship-ssh-")
        self._client = self._words()
        shared = ("-o", "ControlMaster=yes", "-o", f"ControlPersist={PERSIST_SECONDS}")
        seconds = self._options.timeout + 20
        try:
            with tempfile.TemporaryFile() as said:  # a pipe would be kept open by the connection in the background
                done = subprocess.run(  # noqa: S603 - ssh with words of our own
                    [*self._client, *shared, self._host, "true"],
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    timeout=seconds,
                    check=False,
                )
                said.seek(0)
                text = said.read().decode(errors="replace")
        except FileNotFoundError:
            raise DeviceError(f"{self.address}: ssh is not installed on this machine (OpenSSH's client)") from None
        except subprocess.TimeoutExpired:
            raise DeviceError(f"{self.address}: no connection within {seconds} s") from None
        if done.returncode:
            why = self._lost(done.returncode, text) or f"its shell cannot be used: {text.strip() or done.returncode}"
            raise DeviceError(f"{self.address}: {why}")

    def _disconnect(self) -> None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # without a client or a connection
            subprocess.run(  # noqa: S603 - as above
                [*self._client, "-O", "exit", self._host], capture_output=True, timeout=30, check=False
            )
        shutil.rmtree(self._control, ignore_errors=True)

    def _shell(self, command: str) -> Sequence[str]:
        # a login shell may be of any kind
        return [*self._client, "-o", "ControlMaster=no", self._host, f"exec sh -c {shlex.quote(command)}"]

    def _lost(self, code: int, said: str) -> str | None:
        if code != LOST:
            return None
        text = " ".join(said.split())
        for pattern, meaning in _KNOWN:
            if re.search(pattern, text, re.IGNORECASE | re.MULTILINE):
                return f"{meaning} (ssh says: {text[-300:]})"
        return f"the connection was lost{f' (ssh says: {text[-300:]})' if text else ''}"
