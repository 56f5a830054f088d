"""The tutorial runs as it stands: its files are written and its commands typed, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str) -> list[tuple[str, str]]:
    """The code blocks of a page: (language, code)."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


def test_the_tutorial_runs_as_it_stands(tmp_path: Path) -> None:
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    ran = 0
    for language, code in blocks("tutorial.md"):
        if language in ("python", "toml"):
            name = re.match(r"# file: (\S+)\n", code)
            assert name, f"a {language} block of the tutorial does not say which file it is"
            (tmp_path / name[1]).write_text(code)
        elif language == "bash":
            command = ["bash", "-euo", "pipefail", "-c", code]
            done = subprocess.run(command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
            ran += 1
    assert ran >= 4
    assert (tmp_path / "build/shapes/report.html").is_file()
