"""Returns where an artifact's time goes, operator by operator, as its target's runtime can tell."""

from __future__ import annotations

from pathlib import Path

from edgeship.pipeline.isolation import run_isolated
from edgeship.targets.base import OperatorTime, Profiler, load


def profile(target: str, artifact: Path, threads: int = 1) -> list[OperatorTime]:
    """The operators in the order they run, timed in a process of their own; empty for a target that cannot tell."""
    return run_isolated(_profile, target, artifact, threads)


def _profile(target: str, artifact: Path, threads: int) -> list[OperatorTime]:
    runtime = load(target)
    return runtime.profile(artifact, threads) if isinstance(runtime, Profiler) else []
