"""Runs both artifacts of a run folder on an emulated aarch64 and compares their outputs with this machine's, in steps.

    python benchmarks/aarch64.py RECIPE RUN [--samples 20] [--cache DIR] [--cpu cortex-a76]

Needs qemu-aarch64-static (Debian: qemu-user-static), apt-get and dpkg-deb; no root. The aarch64 Python is Debian's,
fetched with an apt configuration of its own; numpy and the runtimes are the wheels of constraints.txt for aarch64. The
runtimes ask /proc/cpuinfo and /sys what the processor is and crash on an x86 machine's answer, so the emulator shows
them a board's. Times under emulation mean nothing; integers do. The default CPU has the int8 dot product (cortex-a72
has not).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from edgeship.pipeline.artifacts import artifact_path
from edgeship.pipeline.compare import Comparison
from edgeship.pipeline.devices import runner
from edgeship.pipeline.devices.base import DeviceError, Launch
from edgeship.pipeline.devices.session import DeviceSession
from edgeship.pipeline.judging import open_jury
from edgeship.pipeline.recipe import load_recipe
from edgeship.targets.base import load
from edgeship.targets.onnxruntime import open_reference

HERE = Path(__file__).parent
EMULATOR = "qemu-aarch64-static"
PACKAGES = ("python3", "python3-minimal", "libstdc++6")
WHEELS = ("numpy", "onnxruntime", "ai-edge-litert")
GLIBC = (28, 27, 26, 17)
PARTS = {"cortex-a72": "0xd08", "cortex-a76": "0xd0b"}
FEATURES = {
    "cortex-a72": "fp asimd evtstrm crc32 cpuid",
    "cortex-a76": "fp asimd atomics fphp asimdhp cpuid asimdrdm asimddp",
}
CORES = 2


class Emulated:
    """A Device: this machine's emulator with a Debian of another architecture."""

    address = "emulated aarch64"
    silence = 3600.0

    def __init__(self, folder: Path, cpu: str) -> None:
        self._command = [
            *("env", f"PYTHONPATH={folder / 'site'}", "ORT_DISABLE_TELEMETRY=1", EMULATOR, "-cpu", cpu, "-L"),
            *(str(folder / "root"), str(folder / "root/usr/bin/python3.11"), runner.__file__),
        ]

    def __enter__(self) -> Emulated:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def push(self, artifact: Path) -> str:
        return str(artifact.absolute())

    def launch(self, target: str) -> Launch:
        del target
        return Launch(self._command, False, lambda code, said: DeviceError(f"ended with exit code {code}: {said}"))


def prepare(folder: Path, cpu: str) -> None:
    """An aarch64 Python with the runtimes in `folder`, fetched where it is not there yet, and a board's own files."""
    if not (folder / "site" / "onnxruntime").is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        _fetch_system(folder)
        _fetch_wheels(folder)
    _describe_board(folder / "root", cpu)


def _fetch_system(folder: Path) -> None:
    for name in ("state/lists/partial", "cache/archives/partial", "root"):
        (folder / name).mkdir(parents=True)
    (folder / "state/status").touch()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "Dir::State": folder / "state",
        "Dir::State::status": folder / "state/status",
        "Dir::Cache": folder / "cache",
    }
    (folder / "apt.conf").write_text("".join(f'{key} "{value}";\n' for key, value in settings.items()))
    apt = ["apt-get", "-q", "-c", str(folder / "apt.conf"), "-o", "Debug::NoLocking=1"]
    _run([*apt, "update"])
    _run([*apt, "install", "-y", "--download-only", "--no-install-recommends", *PACKAGES])
    for package in sorted((folder / "cache/archives").glob("*.deb")):
        _run(["dpkg-deb", "-x", str(package), str(folder / "root")])


def _fetch_wheels(folder: Path) -> None:
    pinned = [line.strip() for line in (HERE.parent / "constraints.txt").read_text().splitlines()]
    wanted = [line for line in pinned if line.partition("==")[0] in WHEELS]
    platforms = [word for minor in GLIBC for word in ("--platform", f"manylinux_2_{minor}_aarch64")]
    words = ["--no-deps", "--only-binary=:all:", "--python-version", "3.11", *platforms, "-d", str(folder / "wheels")]
    _run([sys.executable, "-m", "pip", "download", "-q", *words, *wanted])
    for wheel in sorted((folder / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "site")


def _describe_board(root: Path, cpu: str) -> None:
    head = f"Features\t: {FEATURES[cpu]}\nCPU implementer\t: 0x41\nCPU architecture: 8\n"
    entry = f"{head}CPU variant\t: 0x4\nCPU part\t: {PARTS[cpu]}\nCPU revision\t: 1\n\n"
    _write(root / "proc/cpuinfo", "".join(f"processor\t: {core}\n{entry}" for core in range(CORES)))
    place = root / "sys/devices/system/cpu"
    for name in ("possible", "present", "online"):
        _write(place / name, f"0-{CORES - 1}\n")
    for core in range(CORES):
        own = place / f"cpu{core}"
        facts: dict[str, Any] = {
            "cpufreq/cpuinfo_max_freq": 2400000,
            "cpufreq/cpuinfo_min_freq": 600000,
            "topology/physical_package_id": 0,
            "topology/core_id": core,
            "topology/cluster_cpus_list": f"0-{CORES - 1}",
            "topology/core_siblings_list": f"0-{CORES - 1}",
            "topology/package_cpus_list": f"0-{CORES - 1}",
            "topology/thread_siblings_list": core,
        }
        caches = (("Data", 1, "64K"), ("Instruction", 1, "64K"), ("Unified", 2, "512K"), ("Unified", 3, "2048K"))
        for index, (kind, level, size) in enumerate(caches):
            shared = f"0-{CORES - 1}" if level == 3 else core
            values = {"type": kind, "level": level, "size": size, "shared_cpu_list": shared, "coherency_line_size": 64}
            facts |= {f"cache/index{index}/{name}": value for name, value in values.items()}
        for name, value in facts.items():
            _write(own / name, f"{value}\n")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[:6])} ... failed:\n{done.stderr[-2000:]}")


def compare(recipe_file: Path, run: Path, samples: int, device: Emulated) -> bool:
    """Whether every output is within a step of this machine's; prints a line for each artifact."""
    import onnx_ir as ir

    from edgeship.calibration.writing.qdq import output_steps

    recipe = load_recipe(recipe_file)
    chosen = open_jury(recipe, run / "3-simplify/model.onnx").samples.take(samples, recipe.data.seed)
    close = True
    for target in recipe.targets:
        artifact = run / "5-convert" / artifact_path(target)
        quantized = run / "4-quantize" / f"{recipe.weight_scheme(target)}.onnx"
        steps = output_steps(ir.load(quantized))
        here, reference = load(target).open(artifact), open_reference(quantized)
        with_here, with_reference, ours = Comparison(steps), Comparison(steps), Comparison(steps)
        with ExitStack() as stack:
            there = stack.enter_context(DeviceSession(device, target, artifact))
            for sample in chosen:
                found, own, exact = there.run(sample.feeds), here.run(sample.feeds), reference.run(sample.feeds)
                with_here.update(own, found)
                with_reference.update(exact, found)
                ours.update(exact, own)
        most = max(d.max_steps for d in with_here.differences().values())
        close &= most <= 1
        print(
            f"{target:<12} {len(chosen)} samples: aarch64 against this machine {_steps(with_here)}; "
            f"against the quantized reference {_steps(with_reference)} (this machine: {_steps(ours)})"
        )
    return close


def _steps(comparison: Comparison) -> str:
    differences = comparison.differences().values()
    most, mean = max(d.max_steps for d in differences), max(d.mean_steps for d in differences)
    agreement = comparison.agreement
    same = "" if agreement is None else f", same decision {100 * agreement:.2f} %"
    return f"max {most:g}, mean {mean:.2g} steps{same}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--cache", type=Path, default=Path(".cache/aarch64"))
    parser.add_argument("--cpu", choices=sorted(PARTS), default="cortex-a76")
    options = parser.parse_args()
    if not shutil.which(EMULATOR):
        sys.exit(f"{EMULATOR} is not installed; Debian has it in qemu-user-static")
    cache = options.cache.absolute()
    prepare(cache, options.cpu)
    return 0 if compare(options.recipe, options.run, options.samples, Emulated(cache, options.cpu)) else 1


if __name__ == "__main__":
    sys.exit(main())
