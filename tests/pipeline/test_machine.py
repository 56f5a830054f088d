"""Facts about machines, read from what systems say."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from edgeship.pipeline import machine
from edgeship.pipeline.machine import Cpu, cpu, cpu_key, doctor_facts, machine_facts, parse_cpuinfo

X86 = (
    "processor\t: 0\nmodel name\t: Some CPU @ 2.5GHz\nflags\t\t: fpu avx2 avx512bw avx512_vnni\n"
    "\nprocessor\t: 1\nflags\t: x\n"
)
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\nCPU part\t: 0xd0c\n"


def test_the_first_processor_of_an_x86_list_is_read() -> None:
    assert parse_cpuinfo(X86) == {"model": "Some CPU @ 2.5GHz", "flags": "fpu avx2 avx512bw avx512_vnni"}


def test_an_arm_list_without_a_model_names_the_part() -> None:
    facts = parse_cpuinfo(ARM)
    assert (facts["model"], facts["flags"]) == ("ARM part 0xd0c", "fp asimd asimddp i8mm")


def test_facts_are_json_and_the_key_is_stable() -> None:
    facts = machine_facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["versions"]["edgeship"]
    assert facts["cpu"]["cores"] >= 1
    assert cpu_key() == cpu_key()
    assert len(cpu_key()) == 16


@pytest.mark.parametrize(
    ("architecture", "features", "exact", "words"),
    [
        ("x86_64", ("avx2", "avx512", "avx512_vnni"), True, "AVX512-VNNI"),
        ("x86_64", ("avx2", "avx_vnni"), True, "AVX-VNNI"),
        ("x86_64", ("avx2",), False, "clips large ones"),
        ("x86_64", ("avx2", "avx512"), False, "clips large ones"),
        ("x86_64", (), True, "neither AVX2 nor VNNI"),
        ("aarch64", ("neon", "dot_product"), True, "dot products"),
        ("aarch64", ("neon", "dot_product", "i8mm"), True, "i8mm"),
        ("aarch64", ("neon",), True, "no dot product"),
        ("riscv64", (), True, "Nothing is known"),
    ],
)
def test_a_cpus_features_say_what_int8_is_worth(
    monkeypatch: pytest.MonkeyPatch, architecture: str, features: tuple[str, ...], exact: bool, words: str
) -> None:
    processor = Cpu("a cpu", architecture, 4, features)
    assert processor.has_exact_int8 is exact
    monkeypatch.setattr(machine, "cpu", lambda: processor)
    assert words in doctor_facts()[0]


def test_a_busy_machine_and_a_saving_governor_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "load_per_core", lambda: 1.25)
    monkeypatch.setattr(machine, "governor", lambda: "powersave")
    text = " ".join(doctor_facts())
    assert "load 1.25 per core" in text
    assert "'powersave'" in text


def test_missing_libraries_are_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "versions", lambda: {"edgeship": "1"})
    text = " ".join(doctor_facts())
    for command in ("pip install onnxruntime", "pip install 'edgeship[tflite]'", "pip install 'edgeship[torch]'"):
        assert command in text


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from edgeship.pipeline.machine import *; machine_facts(); doctor_facts();"
        "sys.exit(bool({'numpy', 'onnx', 'onnxruntime', 'torch', 'tensorflow', 'ai_edge_litert'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_this_machines_features_are_those_its_kernel_lists() -> None:
    if sys.platform != "linux":
        pytest.skip("reads /proc/cpuinfo")
    with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 - as a reader of its own
        text = file.read()
    assert ("avx2" in cpu().features) is (" avx2 " in text)
    assert ("avx512_vnni" in cpu().features) is (" avx512_vnni " in text)
