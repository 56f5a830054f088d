"""Runs the benchmarks `bench_*.py` beside this file, each alone in its own process, one after the other.

    make bench                            all; what needs real models and images says that it is left out
    make bench EDGESHIP_DATA=DIR          all
    make bench ARGS=recipes               those whose name contains "recipes"

Figures worth keeping need a quiet machine. The other scripts here take arguments and say so themselves.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main(words: list[str]) -> int:
    """The exit code: 0 when every chosen benchmark came to its end."""
    chosen = [path for path in sorted(HERE.glob("bench_*.py")) if not words or any(word in path.stem for word in words)]
    if not chosen:
        print(f"no benchmark's name contains {' or '.join(words)}", file=sys.stderr)
        return 2
    failed = []
    for path in chosen:
        print(f"==> {path.name}", flush=True)
        if subprocess.run([sys.executable, str(path)], check=False).returncode:
            failed.append(path.name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
