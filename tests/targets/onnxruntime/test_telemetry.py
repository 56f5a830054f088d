from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_the_runtime_leaves_nothing_in_the_users_home_and_sends_nothing(
    tiny_models: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").write_bytes(tiny_models["plain"])
    home = tmp_path / "home"
    home.mkdir()
    program = (
        "from pathlib import Path; from edgeship.targets.base import load; load('onnxruntime').open(Path('model.onnx'))"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env={**environment, "HOME": str(home)}, check=True)
    assert list(home.rglob("*")) == []
