"""Runs a command whose ONNX Runtime and TFLite see a CPU without AVX-512, VNNI and AMX, at full speed.

    python benchmarks/masked_cpu.py COMMAND [ARGUMENT...]
    python benchmarks/masked_cpu.py edgeship evaluate model.onnx --data recipe.toml

Runtimes choose their kernels by the `cpuid` instruction. Here the command and its children load copies of the runtimes'
libraries in which every `cpuid` (two bytes, 0F A2) is an invalid instruction (0F 04), and a handler of the signal that
this raises, which answers like `cpuid` with those feature bits cleared. So kernels for AVX2 run natively: the same
instructions as on a Zen 3 or a Haswell, on data sets an emulator (see no_vnni.py) is too slow for.

What it does not show: another CPU's speed. It is this CPU's AVX2 speed; caches, clock and widths are this one's.
Libraries other than the two (NumPy's) see the CPU as it is. Needs Linux on x86-64, gcc and objdump; the packages
themselves are not modified. That it works is checked at every start: a convolution whose products clip must clip.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ("onnxruntime", "ai_edge_litert")
CPUID, TRAP = b"\x0f\xa2", b"\x0f\x04"
"""0F 04 is undefined on every x86-64; compilers write traps as 0F 0B, which stay what they are."""

HANDLER = r"""
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <ucontext.h>

/* Leaf 7: AVX-512 (F DQ IFMA PF ER CD BW VL; VBMI VBMI2 VNNI BITALG VPOPCNTDQ; 4VNNIW 4FMAPS VP2INTERSECT FP16), AMX
   (BF16 TILE INT8). Subleaf 1: AVX-VNNI AVX512-BF16 AMX-FP16 AVX-IFMA; AVX-VNNI-INT8 AVX-NE-CONVERT AMX-COMPLEX
   AVX-VNNI-INT16 AVX10. */
static const unsigned no_ebx = 1u<<16|1u<<17|1u<<21|1u<<26|1u<<27|1u<<28|1u<<30|1u<<31;
static const unsigned no_ecx = 1u<<1|1u<<6|1u<<11|1u<<12|1u<<14;
static const unsigned no_edx = 1u<<2|1u<<3|1u<<8|1u<<22|1u<<23|1u<<24|1u<<25;
static const unsigned no_eax_1 = 1u<<4|1u<<5|1u<<21|1u<<23;
static const unsigned no_edx_1 = 1u<<4|1u<<5|1u<<8|1u<<10|1u<<19;

static void answer(int signal_number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *at = (const unsigned char *)registers[REG_RIP];
    if (at[0] != 0x0f || at[1] != 0x04) {  /* not ours: the instruction is met again and ends the process */
        signal(signal_number, SIG_DFL);
        return;
    }
    unsigned leaf = (unsigned)registers[REG_RAX], subleaf = (unsigned)registers[REG_RCX], a, b, c, d;
    __cpuid_count(leaf, subleaf, a, b, c, d);
    if (leaf == 7 && subleaf == 0) { b &= ~no_ebx; c &= ~no_ecx; d &= ~no_edx; }
    if (leaf == 7 && subleaf == 1) { a &= ~no_eax_1; d &= ~no_edx_1; }
    registers[REG_RAX] = a; registers[REG_RBX] = b; registers[REG_RCX] = c; registers[REG_RDX] = d;
    registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void install(void) {
    struct sigaction action = {0};
    action.sa_sigaction = answer;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGILL, &action, 0);
}
"""

PROBE = """
import numpy as np, onnxruntime as ort
from onnx import TensorProto as T, helper as h, numpy_helper as n
constant = lambda name, value, dtype: n.from_array(np.asarray(value, dtype), name)
steps = ["DequantizeLinear x s z xf", "DequantizeLinear w s i wf", "Conv xf wf yf", "QuantizeLinear yf t z y"]
nodes = [h.make_node(step.split()[0], step.split()[1:-1], step.split()[-1:]) for step in steps]
graph = h.make_graph(nodes, "g", [h.make_tensor_value_info("x", T.UINT8, [1, 8, 8, 8])],
    [h.make_tensor_value_info("y", T.UINT8, [1, 8, 8, 8])], [constant("s", 1, "f4"), constant("t", 8 * 127, "f4"),
    constant("z", 0, "u1"), constant("i", 0, "i1"), constant("w", np.full((8, 8, 1, 1), 127), "i1")])
model = h.make_model(graph, opset_imports=[h.make_opsetid("", 13)], ir_version=8)
session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
print(int(session.run(None, {"x": np.full((1, 8, 8, 8), 255, np.uint8)})[0].max()))
"""
"""A sum of eight products 255 * 127, which divided by 8 * 127 is 255; each pair clipped at 32767 makes it 129."""


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] in {"-h", "--help"}:
        print(__doc__)
        return 2 if len(sys.argv) < 2 else 0
    with tempfile.TemporaryDirectory() as folder:
        environment = masked(Path(folder))
        return subprocess.run(sys.argv[1:], env=environment, check=False).returncode


def masked(folder: Path) -> dict[str, str]:
    """The environment in which Python programs see the masked CPU; `folder` holds the copies and must outlive them."""
    for tool in ("gcc", "objdump"):
        if shutil.which(tool) is None:
            sys.exit(f"{tool} is not on PATH; masking the CPU needs gcc and objdump (Debian: apt-get install gcc)")
    source, handler = folder / "handler.c", folder / "handler.so"
    source.write_text(HANDLER)
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", str(handler), str(source)], check=True)
    packages = folder / "packages"
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            mirror(Path(spec.origin).parent, packages / name)
    path = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH", "")]))
    preload = " ".join(filter(None, [str(handler), os.environ.get("LD_PRELOAD", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "LD_PRELOAD": preload}
    probe = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=False)
    if probe.stdout.strip() != "129":
        seen = probe.stdout.strip() or f"exit code {probe.returncode}: {probe.stderr.strip()[-500:]}"
        sys.exit(f"ONNX Runtime still finds the CPU's newer instructions: the probe gives {seen}, and should give 129")
    return environment


def mirror(package: Path, copy: Path) -> None:
    """`copy` is the package: links to its files, but native libraries that ask the CPU are changed copies."""
    for place in sorted(package.rglob("*")):
        target = copy / place.relative_to(package)
        if place.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif place.name.endswith(".so") and (offsets := cpuid_offsets(place)):
            content = bytearray(place.read_bytes())
            for offset in offsets:
                content[offset : offset + 2] = TRAP
            target.write_bytes(content)
        elif "__pycache__" not in place.parts:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(place)


def cpuid_offsets(library: Path) -> list[int]:
    """Where in the file its `cpuid` instructions are, by disassembly."""
    content = library.read_bytes()
    if CPUID not in content:
        return []
    command = ["objdump", "-d", "--no-show-raw-insn", str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as listing:
        lines = [line for line in listing.stdout or () if b"cpuid" in line and line.split()[-1] == b"cpuid"]
    if listing.returncode:
        sys.exit(f"objdump cannot read {library}")
    segments = load_segments(content)
    offsets = []
    for line in lines:
        place = int(line.partition(b":")[0], 16)
        at = next(place - start + offset for start, size, offset in segments if start <= place < start + size)
        if content[at : at + 2] != CPUID:
            sys.exit(f"{library}: no cpuid at {place:x}, where the disassembly has one")
        offsets.append(at)
    return offsets


def load_segments(content: bytes) -> list[tuple[int, int, int]]:
    """Address, size and file offset of each segment of a 64-bit ELF file that is loaded."""
    table, size, count = struct.unpack_from("<Q", content, 32)[0], *struct.unpack_from("<HH", content, 54)
    found = []
    for entry in range(table, table + size * count, size):
        kind, _, offset, address, _, length = struct.unpack_from("<IIQQQQ", content, entry)
        if kind == 1:
            found.append((address, length, offset))
    return found


if __name__ == "__main__":
    sys.exit(main())
