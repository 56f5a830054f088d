"""Returns facts about this machine: its CPU, how busy it is, library versions, and what they mean for int8.

Nothing heavy is imported: versions come from package metadata, the CPU from the system.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

LIBRARIES = (
    "edgeship", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "onnxsim", "pillow", "ai-edge-litert",
    "tensorflow", "torch",
)  # fmt: skip
_FEATURES = {
    "avx2": ("avx2",),
    "avx512": ("avx512bw",),
    "avx512_vnni": ("avx512_vnni", "avx512vnni"),
    "avx_vnni": ("avx_vnni",),
    "amx_int8": ("amx_int8",),
    "neon": ("asimd", "neon"),
    "dot_product": ("asimddp", "hw.optional.arm.feat_dotprod"),
    "i8mm": ("i8mm", "hw.optional.arm.feat_i8mm"),
}
_ARM = frozenset({"aarch64", "arm64", "armv7l", "armv8l"})
_X86 = frozenset({"x86_64", "amd64", "i686", "i386"})
BUSY = 0.5
"""Load per core above which times are not to be trusted."""


@dataclass(frozen=True)
class Cpu:
    """A processor: `features` are those that decide how int8 runs, by one name on every system."""

    model: str
    architecture: str
    cores: int
    features: tuple[str, ...]

    @property
    def is_x86(self) -> bool:
        """Whether it is an Intel or AMD processor."""
        return self.architecture.lower() in _X86

    @property
    def has_exact_int8(self) -> bool:
        """Whether int8 products are added without clipping by ONNX Runtime's kernels."""
        return not self.is_x86 or "avx2" not in self.features or bool({"avx512_vnni", "avx_vnni"} & set(self.features))


@cache
def cpu() -> Cpu:
    """The processor of this machine."""
    facts = _proc_cpuinfo()
    if platform.system() == "Darwin":
        facts = _sysctl()
    flags = set(facts.get("flags", "").lower().split())
    features = tuple(name for name, names in _FEATURES.items() if flags.intersection(names))
    model = facts.get("model") or platform.processor() or platform.machine() or "unknown"
    return Cpu(model, platform.machine() or "unknown", _cores(), features)


def cpu_key() -> str:
    """A short name for the kind of CPU: equal where runtimes choose the same kernels; results elsewhere may differ."""
    facts = asdict(cpu())
    facts.pop("cores")
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """The installed version of each library that results depend on; absent ones are left out."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def load_per_core() -> float | None:
    """The one-minute load average by core; None where the system does not tell."""
    try:
        return os.getloadavg()[0] / _cores()
    except (OSError, AttributeError):
        return None


def governor() -> str | None:
    """The first core's frequency governor; None where the system does not tell."""
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None


def machine_facts() -> dict[str, Any]:
    """All facts, JSON-able: {cpu, system, python, governor, load_per_core, versions}."""
    load = load_per_core()
    return {
        "cpu": {**asdict(cpu()), "features": list(cpu().features)},
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "governor": governor(),
        "load_per_core": None if load is None else round(load, 2),
        "versions": versions(),
    }


def described(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of `machine_facts`, from what a runner on some machine says of it as it is."""
    known = parse_cpuinfo(str(raw.get("cpuinfo", "")))
    flags = set(known.get("flags", "").lower().split())
    features = [name for name, names in _FEATURES.items() if flags.intersection(names)]
    cores, load = int(raw["cores"]), raw.get("load")
    model = known.get("model") or str(raw["architecture"])
    return {
        "cpu": {"model": model, "architecture": raw["architecture"], "cores": cores, "features": features},
        "system": raw["system"],
        "python": raw["python"],
        "governor": raw.get("governor"),
        "load_per_core": None if load is None else round(load / cores, 2),
        "versions": dict(raw["versions"]),
    }


def busy_between(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of the machine that a runner described twice, and what its processors did in between, 0..1 of all time.

    `steal` is what a hypervisor gave to others, `busy` what was neither idle nor stolen; both None where unknown.
    """
    spent = [later - earlier for earlier, later in zip(before["ticks"][:8], after["ticks"][:8], strict=False)]
    total = sum(spent)
    known = len(spent) == 8 and total > 0  # user nice system idle iowait irq softirq steal (proc(5))
    facts = described(before)
    facts["steal"] = round(spent[7] / total, 4) if known else None
    facts["busy"] = round((total - spent[3] - spent[4] - spent[7]) / total, 4) if known else None
    return facts


def kernels_of(facts: Mapping[str, Any]) -> str:
    """What runtimes choose their kernels by, from a machine's facts: times of two such kinds cannot be compared."""
    return f"{facts['cpu']['architecture']} with {', '.join(sorted(facts['cpu']['features'])) or 'no int8 features'}"


def doctor_facts() -> list[str]:
    """What this machine means for int8, one sentence each."""
    return [*_int8_sentences(cpu()), *_time_sentences(load_per_core(), governor()), *_version_sentences(versions())]


def _int8_sentences(processor: Cpu) -> list[str]:
    has = set(processor.features)
    if processor.is_x86:
        if has & {"avx512_vnni", "avx_vnni"}:
            kind = "AVX512-VNNI" if "avx512_vnni" in has else "AVX-VNNI"
            return [
                f"This CPU has {kind}: int8 products are added in 32 bits, nothing clips, and int8 can be up to 4 "
                "times as fast as fp32.",
                'quantize.scheme = "auto" tries full-range int8, pair-limited int8 and uint8 weights here, and '
                "keeps the fastest that meets the gates.",
                "An ONNX Runtime artifact that is exact here can still clip on x86 CPUs without VNNI; pair-limited "
                "weights (the default for the target onnxruntime) prevent it.",
            ]
        if "avx2" in has:
            return [
                "This CPU has AVX2 and no VNNI: ONNX Runtime adds two int8 products in 16 bits and clips large ones; "
                "keep pair-limited weights (the default for the target onnxruntime).",
                'quantize.scheme = "auto" tries pair-limited int8 weights and uint8 weights (exact, slower) here, '
                "and layers in float where int8 is slower, as depthwise convolutions can be.",
                "TensorFlow Lite's kernels do not clip here. Expect int8 to be at most twice as fast as fp32.",
            ]
        return ["This CPU has neither AVX2 nor VNNI: int8 is exact, and hardly faster than fp32."]
    if processor.architecture.lower() in _ARM:
        if "i8mm" in has or "dot_product" in has:
            kind = "int8 matrix products (i8mm)" if "i8mm" in has else "dot products"
            return [f"This CPU has {kind}: nothing clips, int8 can be up to 4 times as fast as fp32."]
        return ["This CPU has no dot product: int8 is exact and up to twice as fast as fp32."]
    return [f"Nothing is known about int8 on {processor.architecture}; measure it with edgeship bench."]


def _time_sentences(load: float | None, frequency: str | None) -> list[str]:
    sentences = []
    if load is not None and load > BUSY:
        sentences.append(f"The machine is busy (load {load:.2f} per core): times measured now are not to be trusted.")
    if frequency is not None and frequency not in ("performance", "schedutil"):
        sentences.append(f"The frequency governor is {frequency!r}: times vary; 'performance' makes them comparable.")
    return sentences


def _version_sentences(found: Mapping[str, str]) -> list[str]:
    sentences = []
    if "onnxruntime" not in found:
        sentences.append("ONNX Runtime is not installed: pip install onnxruntime.")
    if "ai-edge-litert" not in found:
        judge = "; TensorFlow's interpreter stands in for its runtime" if "tensorflow" in found else ""
        sentences.append(
            f"ai-edge-litert is not installed: pip install 'edgeship[tflite]' for the target tflite{judge}."
        )
    if "torch" not in found:
        sentences.append("torch is not installed: pip install 'edgeship[torch]' for models given as PyTorch.")
    return sentences


def _cores() -> int:
    allowed = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(allowed(0)) if allowed is not None else os.cpu_count() or 1


def _proc_cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return parse_cpuinfo(text)


def parse_cpuinfo(text: str) -> dict[str, str]:
    """{model, flags} of the first processor in the text of /proc/cpuinfo, of x86 or ARM."""
    facts: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key.lower() in ("model name", "hardware"):
            facts.setdefault("model", value)
        elif key.lower() in ("flags", "features"):
            facts.setdefault("flags", value)
        elif key.lower() == "cpu part":
            facts.setdefault("part", value)
    if "model" not in facts and "part" in facts:
        facts["model"] = f"ARM part {facts['part']}"
    return facts


def _sysctl() -> dict[str, str]:
    try:
        command = ["/usr/sbin/sysctl", "-a"]
        text = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout  # noqa: S603 - fixed words
    except (OSError, subprocess.SubprocessError):
        return {}
    values = {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    flags = [*values.get("machdep.cpu.features", "").split(), *values.get("machdep.cpu.leaf7_features", "").split()]
    flags += ["neon"] if platform.machine() in _ARM else []
    flags += [key.lower() for key, value in values.items() if key.startswith("hw.optional.arm.") and value == "1"]
    return {"model": values.get("machdep.cpu.brand_string", ""), "flags": " ".join(flags)}
