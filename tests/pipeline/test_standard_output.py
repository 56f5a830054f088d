"""What C and C++ code prints while an exporter runs stays off standard output, and what follows arrives."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from edgeship.calibration.errors import StageError
from edgeship.pipeline.recipe import load_recipe
from edgeship.pipeline.stages.export import export_model
from edgeship.pipeline.standard_output import closed_output


def test_what_is_written_to_the_descriptor_is_dropped_meanwhile(capfd: pytest.CaptureFixture[str]) -> None:
    library = ctypes.CDLL(None)
    library.puts(b"before")

    def fail() -> None:
        with closed_output():
            library.puts(b"from C")
            os.write(1, b"from the system")
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    library.puts(b"after")
    library.fflush(None)
    assert capfd.readouterr().out == "before\nafter\n"


def test_the_descriptor_comes_back_with_the_last_thread(capfd: pytest.CaptureFixture[str]) -> None:
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with closed_output():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with closed_output():
        thread.start()
        assert entered.wait(10)
    os.write(1, b"dropped")
    leave.set()
    thread.join()
    os.write(1, b"kept")
    assert capfd.readouterr().out == "kept"


def test_a_process_without_standard_output_goes_on() -> None:
    code = (
        "import os; os.close(1)\nfrom edgeship.pipeline.standard_output import closed_output\n"
        "with closed_output(): pass\nos.write(2, b'done')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (0, b"done")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_export_that_fails_prints_nothing_and_tells_the_cause(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d((5, 7)), nn.AdaptiveMaxPool2d(3))\n"
    )
    (tmp_path / "recipe.toml").write_text(
        'name = "test"\n[model]\nsource = "model.py:build"\n[input]\nshape = [1, 3, 34, 34]\n[targets.onnxruntime]\n'
    )
    with pytest.raises(StageError, match=r"dynamo: DispatchError: No ONNX function found for .*adaptive_max_pool2d"):
        export_model(load_recipe(tmp_path / "recipe.toml"))
    assert capfd.readouterr() == ("", "")
