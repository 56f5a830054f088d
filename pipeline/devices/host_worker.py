"""Returns an exit code after serving one artifact on this machine; started by `worker.Worker`, one process each.

It is the runner that devices get, and knows the runtimes of other distributions' targets besides.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ |= {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}  # as on devices

from edgeship.pipeline.devices.runner import ENGINES, serve
from edgeship.pipeline.isolation import die_with_parent


class SessionEngine:
    """A target's own Session as the runner takes it, for targets whose runtime the runner does not know."""

    def __init__(self, target: str, path: str, threads: int) -> None:
        from edgeship.targets.base import load

        self._session = load(target).open(Path(path), threads)
        self.inputs = [_info(info) for info in self._session.inputs]
        self.outputs = [_info(info) for info in self._session.outputs]

    def run(self, arrays: list[Any]) -> list[Any]:
        """The outputs."""
        names = [info["name"] for info in self.inputs]
        results = self._session.run(dict(zip(names, arrays, strict=True)))
        return [results[info["name"]] for info in self.outputs]


def _info(info: Any) -> dict[str, Any]:
    return {"name": info.name, "shape": list(info.shape), "dtype": info.dtype.name}


class Engines(Mapping[str, Callable[[str, int], Any]]):
    """The runner's engines, and every other target's Session."""

    def __getitem__(self, name: str) -> Callable[[str, int], Any]:
        return ENGINES.get(name) or (lambda path, threads: SessionEngine(name, path, threads))

    def __iter__(self) -> Iterator[str]:
        return iter(ENGINES)

    def __len__(self) -> int:
        return len(ENGINES)


def main() -> int:
    """The exit code; keeps the answers apart from what a runtime prints to standard output."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return serve(sys.stdin.buffer, answers, Engines())


if __name__ == "__main__":
    raise SystemExit(main())
