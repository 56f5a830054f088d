"""Artifacts run on devices: over a real sshd on loopback, and through adb as far as that goes without a phone."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from edgeship.calibration.errors import InputError, StageError
from edgeship.calibration.types import Array
from edgeship.pipeline.cli import cli
from edgeship.pipeline.devices.base import Device, DeviceError, is_address, open_device
from edgeship.pipeline.devices.session import DeviceSession, open_on
from edgeship.pipeline.recipe_sections import DeviceOptions
from edgeship.targets.base import ConvertOptions, load


@pytest.mark.parametrize(
    ("text", "known"),
    [
        *(("host", True), ("ssh://board", True), ("ssh://pi@board.local:2222", True), ("ssh://[::1]:22", True)),
        *(("adb:emulator-5554", True), ("adb:10.0.0.2:5555", True)),
        *(("", False), ("board", False), ("ssh://", False), ("ssh://a b", False), ("ssh://-oProxyCommand=x", False)),
        *(("adb:", False), ("adb:-s", False), ("http://board", False)),
    ],
)
def test_an_address_is_told_from_what_is_none(text: str, known: bool) -> None:
    assert is_address(text) is known
    if not known:
        with pytest.raises(InputError, match="not a device; accepted: host, ssh://"):
            open_device(text)


def test_a_port_that_does_not_exist_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"port 70000; accepted: 1\.\.65535"):
        open_device("ssh://board:70000")


def test_a_name_stands_for_its_address() -> None:
    assert open_device("pi", {"pi": DeviceOptions(url="ssh://pi@board:2222")}).address == "ssh://pi@board:2222"
    with pytest.raises(InputError, match="did you mean 'pi'"):
        open_device("pj", {"pi": DeviceOptions(url="ssh://pi@board")})


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@dataclass(frozen=True)
class Sshd:
    """A running sshd: its port, its own processes' root, and the files that let this user in."""

    port: int
    pid: int
    folder: Path

    def options(self, **more: Any) -> DeviceOptions:
        words = {
            "url": f"ssh://127.0.0.1:{self.port}",
            "identity": str(self.folder / "user"),
            "known_hosts": str(self.folder / "known"),
            "python": sys.executable,
            "workdir": str(self.folder / "work"),
            "silence": 60,
        }
        return DeviceOptions(**{**words, **more})

    def device(self, **more: Any) -> Device:
        return open_device("board", {"board": self.options(**more)})

    def left(self) -> list[str]:
        """What lies in the device's work folder, as soon as it is empty or after a while."""
        deadline = time.monotonic() + 20
        while (names := names_in(self.folder / "work")) and time.monotonic() < deadline:
            time.sleep(0.05)
        return names


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    server = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if server is None or not shutil.which("ssh"):
        pytest.skip("needs OpenSSH's client and server: apt-get install openssh-client openssh-server")
    folder = tmp_path_factory.mktemp("sshd")
    (folder / "work").mkdir()
    for name in ("host", "user", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd's privilege separation wants it
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "user.pub",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "MaxStartups": "50",
    }
    (folder / "config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
    for name, key in (("known", "host.pub"), ("wrong", "stranger.pub")):
        kind, content, *_ = (folder / key).read_text().split()
        (folder / name).write_text(f"[127.0.0.1]:{port} {kind} {content}\n")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([server, "-D", "-e", "-f", str(folder / "config")], stderr=log)
    try:
        _wait_for_port(port, process, folder / "log")
        yield Sshd(port, process.pid, folder)
    finally:
        process.terminate()
        process.wait()


def _wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    pytest.fail(f"sshd does not listen: {log.read_text()}")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, bytes]) -> dict[str, Path]:
    """A float artifact for each target, TFLite's with its own layout."""
    folder = tmp_path_factory.mktemp("artifacts")
    paths = {}
    for name in ("onnxruntime", "tflite"):
        target = load(name)
        paths[name] = folder / f"model{target.suffix}"
        model = ir.serde.deserialize_model(onnx.load_from_string(tiny_models["residual"]))
        paths[name].write_bytes(target.convert(model, ConvertOptions()))
    return paths


@pytest.mark.parametrize("target", ["onnxruntime", "tflite"])
def test_a_device_session_computes_what_a_local_one_does(
    sshd: Sshd, artifacts: dict[str, Path], tiny_images: Array, target: str
) -> None:
    local = load(target).open(artifacts[target])
    with sshd.device() as device, open_on(device, target, artifacts[target]) as session:
        assert session.inputs[0] == local.inputs[0]
        assert [info.name for info in session.outputs] == ["logits"]
        for image in tiny_images[:4]:
            feeds = {"image": image[None]}
            assert np.allclose(session.run(feeds)["logits"], local.run(feeds)["logits"], rtol=1e-5, atol=1e-5)
        with pytest.raises(InputError, match="image"):
            session.run({"image": tiny_images[0]})
    assert sshd.left() == []


def recipe_of(sshd: Sshd, folder: Path, **more: Any) -> Path:
    lines = [f'{key} = "{value}"' for key, value in sshd.options(**more).model_dump().items() if isinstance(value, str)]
    path = folder / "recipe.toml"
    text = '[model]\nsource = "model.onnx"\n[targets.onnxruntime]\n[devices.board]\n'
    path.write_text(f'name = "tiny"\n{text}' + "\n".join(lines) + "\n")
    return path


def test_bench_and_compare_run_on_the_device(
    sshd: Sshd, artifacts: dict[str, Path], tiny_data: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(sshd, tmp_path)
    words = ["--device", "board", "--recipe", str(recipe), "--json"]
    paths = [str(path) for path in artifacts.values()]
    bench = CliRunner().invoke(cli, ["bench", *paths, "--runs", "8", "--warmup", "1", *words])
    assert bench.exit_code == 0, bench.output
    assert f'"device": "ssh://127.0.0.1:{sshd.port}"' in bench.stdout
    compared = CliRunner().invoke(cli, ["compare", *paths, "--data", str(tiny_data), "--samples", "3", *words])
    assert compared.exit_code == 0, compared.output
    assert sshd.left() == []


def refusal(device: Device, artifact: Path) -> str:
    with pytest.raises(DeviceError) as caught, device, DeviceSession(device, "onnxruntime", artifact):
        pass
    assert caught.value.exit_code == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"known_hosts": "{folder}/wrong"}, "its host key is not the known one"),
        ({"identity": "{folder}/stranger"}, "it refuses the login"),
        ({"url": "ssh://127.0.0.1:1"}, "nothing answers on its ssh port"),
        ({"url": "ssh://no-such-host.invalid"}, "there is no host of this name"),
        ({"workdir": "/no/such/folder"}, "cannot make a folder in /no/such/folder"),
        ({"python": "no-python-3"}, "the device has no no-python-3"),
    ],
)
def test_what_a_device_lacks_is_said(sshd: Sshd, artifacts: dict[str, Path], more: dict[str, str], words: str) -> None:
    named = {key: value.format(folder=sshd.folder) for key, value in more.items()}
    assert words in refusal(sshd.device(**named), artifacts["onnxruntime"])
    assert sshd.left() == []


def script(folder: Path, text: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_missing_runtime_is_named_with_the_command_that_installs_it(
    sshd: Sshd, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('not here')")
    python = script(tmp_path, f'PYTHONPATH={tmp_path} exec {sys.executable} "$@"')
    with pytest.raises(StageError, match=r"onnxruntime cannot be imported.*pip install onnxruntime"):
        refusal(sshd.device(python=python), artifacts["onnxruntime"])
    assert sshd.left() == []


def test_a_device_that_falls_silent_is_given_up(sshd: Sshd, artifacts: dict[str, Path], tmp_path: Path) -> None:
    device = sshd.device(python=script(tmp_path, "cat > /dev/null"), silence=1)
    with pytest.raises(StageError, match=r"on ssh://127.*gave no answer within 1 s"):
        refusal(device, artifacts["onnxruntime"])
    assert sshd.left() == []


def test_a_killed_process_is_told_from_a_lost_connection(
    sshd: Sshd, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    told = refusal(sshd.device(python=script(tmp_path, "kill -9 $$")), artifacts["onnxruntime"])
    assert "its process was killed on the device, most likely for want of memory" in told
    assert sshd.left() == []


def test_a_full_disk_says_how_much_was_wanted(sshd: Sshd, artifacts: dict[str, Path]) -> None:
    """/dev/full refuses every write as a full disk does."""
    artifact = artifacts["onnxruntime"]
    with sshd.device() as device:
        with pytest.raises(DeviceError) as caught:
            device._write(artifact, "/dev/full")  # type: ignore[attr-defined]  # of every remote device
        assert "no space left" in str(caught.value)
        assert f"({artifact.stat().st_size} bytes)" in str(caught.value)
        assert "KiB free" in str(caught.value)


def children(pid: int) -> list[int]:
    """The processes below `pid`, from /proc."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
    below, found = [pid], []
    while below:
        below = [child for child, parent in parents.items() if parent in below]
        found += below
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the server's processes in /proc")
def test_a_lost_connection_is_said_and_leaves_nothing(
    sshd: Sshd, artifacts: dict[str, Path], tiny_images: Array
) -> None:
    with sshd.device() as device:
        session = DeviceSession(device, "onnxruntime", artifacts["onnxruntime"])
        with session:
            for pid in children(sshd.pid):
                with contextlib.suppress(OSError):  # killing one may end others
                    if "sshd" in Path(f"/proc/{pid}/comm").read_text():
                        os.kill(pid, signal.SIGKILL)
            with pytest.raises(DeviceError, match="the connection was lost"):
                session.run({"image": tiny_images[:1]})
    assert sshd.left() == []


def test_nothing_stays_when_the_caller_is_killed(sshd: Sshd) -> None:
    code = (
        "import json, sys, time\n"
        "from edgeship.pipeline.devices.base import open_device\n"
        "from edgeship.pipeline.recipe_sections import DeviceOptions\n"
        "with open_device('board', {'board': DeviceOptions(**json.loads(sys.argv[1]))}):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
    )
    words = [sys.executable, "-c", code, sshd.options().model_dump_json()]
    caller = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert caller.stdout is not None
    assert caller.stdout.readline() == "ready\n"
    assert len(names_in(sshd.folder / "work")) == 1
    caller.kill()
    caller.communicate()
    assert sshd.left() == []


def test_an_unreachable_device_is_told_before_the_first_stage(tmp_path: Path, tiny_models: dict[str, bytes]) -> None:
    (tmp_path / "model.onnx").write_bytes(tiny_models["plain"])
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('name = "tiny"\n[model]\nsource = "model.onnx"\n[targets.onnxruntime]\n')
    words = ["deploy", str(recipe), "--out", str(tmp_path / "run"), "--device", "ssh://127.0.0.1:1"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 1
    assert "nothing answers on its ssh port" in result.stderr
    assert not (tmp_path / "run").exists()


STAND_IN = """#!/bin/sh
# adb as far as edgeship uses it; "shell" runs on this machine
if [ "$1" = devices ]; then printf 'List of devices attached\\nPHONE\\tdevice\\nSHY\\tunauthorized\\n\\n'; exit 0; fi
[ "$1 $2 $3 $4" = "-s PHONE shell -T" ] || { echo "error: unexpected words: $*" >&2; exit 1; }
exec sh -c "$5"
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "bin" / "adb"
    path.parent.mkdir()
    path.write_text(STAND_IN)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_an_artifact_runs_through_adbs_shell_and_nothing_stays(
    stand_in: Path, artifacts: dict[str, Path], tiny_images: Array
) -> None:
    options = DeviceOptions(url="adb:PHONE", python=sys.executable, workdir=str(stand_in))
    expected = load("tflite").open(artifacts["tflite"]).run({"image": tiny_images[:1]})
    with (
        open_device("phone", {"phone": options}) as device,
        open_on(device, "tflite", artifacts["tflite"]) as session,
    ):
        found = session.run({"image": tiny_images[:1]})
    assert np.allclose(found["logits"], expected["logits"], rtol=1e-5, atol=1e-5)
    assert names_in(stand_in) == []


@pytest.mark.usefixtures("stand_in")
def test_a_phone_that_has_not_allowed_this_machine_says_so() -> None:
    with pytest.raises(DeviceError, match="confirm the question on its screen"):
        open_device("adb:SHY").__enter__()
    with pytest.raises(DeviceError, match=r"no device of this serial; there are: PHONE \(device\), SHY"):
        open_device("adb:OTHER").__enter__()


def test_the_real_adb_client_says_that_there_is_no_such_device(monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("adb"):
        pytest.skip("needs adb: apt-get install adb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(free.getsockname()[1]))
    try:
        with pytest.raises(DeviceError, match="adb knows no device of this serial; there are: none"):
            open_device("adb:NO-SUCH-PHONE").__enter__()
    finally:
        subprocess.run(["adb", "kill-server"], capture_output=True, check=False)


def test_without_the_client_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DeviceError, match=r"adb .* is not installed here"):
        open_device("adb:PHONE").__enter__()
    with pytest.raises(DeviceError, match="ssh is not installed on this machine"):
        open_device("ssh://board").__enter__()


def test_only_runners_are_kept_to_one_thread() -> None:
    show = "; import os; print([os.environ.get(name) for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')])"
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    for module, expected in (("worker", "[None, None]"), ("host_worker", "['1', '1']")):
        code = f"import edgeship.pipeline.devices.{module}{show}"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected
