"""A model as C source: what a C compiler makes of it is the model, and what Micro cannot run is refused."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from edgeship.calibration.errors import InputError, UnsupportedError
from edgeship.calibration.graph.onnx_file import load_onnx
from edgeship.pipeline.c_source import c_source
from edgeship.pipeline.cli import cli
from edgeship.targets.base import ConvertOptions, load

MODEL = Path(__file__).parents[2] / "golden" / "residual.qdq.onnx"
MAIN = """
#include <stdio.h>
#include <stdint.h>
#include "{name}.h"
int main(void) {{
  if ((uintptr_t){name} % 16) return 1;
  return fwrite({name}, 1, {name}_len, stdout) != {name}_len;
}}
"""


@pytest.fixture(scope="module")
def int8() -> bytes:
    return load("tflite").convert(load_onnx(MODEL), ConvertOptions(io_dtype="int8"))


@pytest.mark.parametrize("compiler", ["gcc", "g++"])
def test_a_compiled_array_is_the_model_on_a_multiple_of_16(int8: bytes, tmp_path: Path, compiler: str) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    made = c_source(load("tflite"), int8, "net.tflite")
    (tmp_path / "net.c").write_text(made.source)
    (tmp_path / "net.h").write_text(made.header)
    (tmp_path / "main.c").write_text(MAIN.format(name="net"))
    strict = ["-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *strict, "net.c", "main.c", "-o", "net"], cwd=tmp_path, check=True, capture_output=True)
    assert subprocess.run([tmp_path / "net"], check=True, capture_output=True).stdout == int8


def test_names_become_identifiers(int8: bytes) -> None:
    target = load("tflite")
    assert "const unsigned char my_net_v1_2[]" in c_source(target, int8, "my-net v1.2.tflite").source
    assert "extern const unsigned int model_3d_len;" in c_source(target, int8, "3d.c").header


def test_real_inputs_and_missing_operators_are_listed_together() -> None:
    text = "g (float[2, 8] x) => (float[2, 3] y) {k = Constant<value_ints = [3]>() y, i = TopK<axis = 1>(x, k)}"
    opsets = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(onnx.parser.parse_graph(text), opset_imports=opsets, ir_version=9)
    content = load("tflite").convert(ir.from_proto(model), ConvertOptions())
    with pytest.raises(UnsupportedError) as refusal:
        c_source(load("tflite"), content, "net")
    said = str(refusal.value)
    assert "operator TOPK_V2: has no kernel in TensorFlow Lite Micro" in said
    assert "input x: is not int8; seen: float32" in said
    assert "output y: is not int8" in said


def test_other_targets_have_no_form_in_c() -> None:
    with pytest.raises(InputError, match="onnxruntime has no form in C; accepted: tflite"):
        c_source(load("onnxruntime"), b"", "net")


def test_convert_writes_source_and_header_beside_the_file(tmp_path: Path) -> None:
    args = ["convert", str(MODEL), "-o", str(tmp_path / "net.tflite"), "--target", "tflite", "--c-array"]
    for seen in ("float32", "uint8"):
        refused = CliRunner().invoke(cli, [*args, "--io-dtype", seen])
        assert refused.exit_code == 2
        assert f"would be {seen}; accepted: --io-dtype int8" in refused.stderr
    assert list(tmp_path.iterdir()) == []
    assert CliRunner().invoke(cli, [*args, "--io-dtype", "int8"]).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.c", "net.h", "net.tflite"]
