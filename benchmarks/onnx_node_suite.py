"""Runs ONNX's own backend node suite through a converter and the real runtime, and says what passes.

    python benchmarks/onnx_node_suite.py                     # all cases, TFLite
    python benchmarks/onnx_node_suite.py --only Resize       # one operator
    python benchmarks/onnx_node_suite.py --json results.json

A case passes when the artifact's outputs have the standard's shapes and kinds (float, integer, bool) and every value
is within rtol 1e-3 / atol 1e-4. A refusal, an exception, a crash and a hang are all failures of that case.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from _node_cases import Bake, Case, Excluded, load_cases
from _worker_pool import Outcome, run_jobs

RTOL, ATOL = 1e-3, 1e-4
PASSED = "passed"
USUAL_TYPES = {"float32", "int32", "int64", "bool"}


@dataclass(frozen=True)
class Result:
    """What became of one case. `obstacles`: the operators named by a refusal, or else the case's own operator."""

    name: str
    operator: str
    status: str
    reason: str
    obstacles: tuple[str, ...]
    convert_seconds: float
    is_vision: bool
    is_expanded: bool
    types: str


@dataclass(frozen=True)
class Job:
    """A case for a worker process, which knows nothing of the suite."""

    target: str
    model: bytes
    feeds: dict[str, Any]
    expected: dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """A worker's answer."""

    status: str
    reason: str
    obstacles: tuple[str, ...] = ()
    convert_seconds: float = 0.0


def judge(job: Job) -> Verdict:
    """Converts, loads and runs one case; which of the steps failed is the status."""
    import onnx
    import onnx_ir as ir

    from edgeship.calibration.errors import UnsupportedError
    from edgeship.targets.base import ConvertOptions

    target = _target(job.target)
    model = ir.from_proto(onnx.load_from_string(job.model))
    begin = time.perf_counter()
    try:
        content = target.convert(model, ConvertOptions(io_layout="nchw"))
    except UnsupportedError as error:
        rules = [f"{finding.where}: {finding.rule}; {finding.seen}" for finding in error.findings]
        names = sorted({finding.where.split()[0] for finding in error.findings})
        return Verdict("refused", " | ".join(rules), tuple(names), time.perf_counter() - begin)
    except Exception as error:  # any other exception is a fault of the converter, to be counted
        return Verdict("error", _told(error), (), time.perf_counter() - begin)
    seconds = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{target.suffix}"
        path.write_bytes(content)
        try:
            session = target.open(path)
        except Exception as error:
            return Verdict("not loaded", _told(error), (), seconds)
        try:
            seen = session.run(job.feeds)
        except Exception as error:
            return Verdict("not run", _told(error), (), seconds)
    reason = _difference(job.expected, seen)
    return Verdict("wrong" if reason else PASSED, reason, (), seconds)


@functools.cache
def _target(name: str) -> Any:
    from edgeship.targets.base import load

    return load(name)


def _told(error: Exception) -> str:
    """The exception in one line, with the place in our own code that raised it."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}" if frames else ""
    return f"{type(error).__name__} at {place}: {' '.join(str(error).split())[:300]}"


def _difference(expected: dict[str, Any], seen: dict[str, Any]) -> str:
    """What is wrong with the outputs; empty when nothing is."""
    for name, want in expected.items():
        if name not in seen:
            return f"output {name!r} is missing"
        got = np.asarray(seen[name])
        if got.shape != want.shape:
            return f"shape {got.shape} instead of {want.shape}"
        if _kind(got.dtype) != _kind(want.dtype):
            return f"type {got.dtype} instead of {want.dtype}"
        with np.errstate(all="ignore"):
            close = np.isclose(got.astype(np.float64), want.astype(np.float64), RTOL, ATOL, equal_nan=True)
        if not close.all():
            index = tuple(int(i) for i in np.argwhere(~close)[0])
            share = 1 - close.mean()
            return f"{share:.0%} of the values differ; at {index}: {got[index]} instead of {want[index]}"
    return ""


def _kind(dtype: np.dtype[Any]) -> str:
    return {"f": "float", "i": "integer", "u": "integer", "b": "bool"}.get(dtype.kind, dtype.kind)


def result(case: Case, outcome: Outcome) -> Result:
    """The case's result from how its job ended."""
    verdict = outcome.value if isinstance(outcome.value, Verdict) else None
    if verdict is None:
        status = "error" if outcome.ending == "raised" else outcome.ending
        verdict = Verdict(status, str(outcome.value))
    known = tuple(name for name in verdict.obstacles if name in case.operators)
    types = sorted({str(v.dtype) for v in (*case.feeds.values(), *case.expected.values())})
    return Result(
        name=case.name,
        operator=case.operator,
        status=verdict.status,
        reason=verdict.reason,
        obstacles=() if verdict.status == PASSED else known or (case.operator,),
        convert_seconds=verdict.convert_seconds,
        is_vision=case.is_vision,
        is_expanded=case.is_expanded,
        types=" ".join(types),
    )


# What is printed -----------------------------------------------------------------------------------------------------


def rate(results: Sequence[Result]) -> str:
    """'passed of all (percent)'."""
    passed = sum(r.status == PASSED for r in results)
    return f"{passed} of {len(results)} ({passed / len(results):.1%})" if results else "0 of 0"


def print_filter(cases: Sequence[Case], excluded: Sequence[Excluded], bake: Bake, whole: bool) -> None:
    """What is run and what is not, with the reasons."""
    baked = [case for case in cases if case.baked]
    operators = sorted({case.operator for case in baked})
    print(f"{len(cases) + len(excluded)} node cases; {len(cases)} run, {len(excluded)} left out:")
    reasons = collections.defaultdict(list)
    for item in excluded:
        reasons[item.reason].append(item.name)
    for reason, names in sorted(reasons.items(), key=lambda pair: -len(pair[1])):
        shown = names if whole else names[:4]
        more = "" if len(shown) == len(names) else f", ... (--list-excluded shows all {len(names)})"
        print(f"  {len(names):4d}  {reason}\n        {', '.join(shown)}{more}")
    print(f"operands made constant (--bake {bake}): in {len(baked)} cases of {', '.join(operators) or 'no operator'}")


def print_groups(title: str, pairs: Iterable[tuple[str, str]], limit: int) -> None:
    """Counts per group, most frequent first, each with examples."""
    groups = collections.defaultdict(list)
    for group, name in pairs:
        groups[group].append(name)
    ordered = sorted(groups.items(), key=lambda pair: (-len(pair[1]), pair[0]))
    print(f"\n{title}")
    for group, names in ordered[:limit]:
        print(f"  {len(names):4d}  {group[:170]}   [{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}]")
    if len(ordered) > limit:
        print(f"        and {len(ordered) - limit} more groups with {sum(len(n) for _, n in ordered[limit:])} cases")


def work_list(failed: Sequence[Result]) -> list[tuple[str, int, int]]:
    """Operators in the order in which doing them wins most, with the cases won at each step, all and vision.

    Greedy: next comes the operator that is the last obstacle of most cases, or has the largest share in those of the
    others.
    """
    left = [(item, set(item.obstacles)) for item in failed]
    steps = []
    while left:
        wins: collections.Counter[str] = collections.Counter()
        shares: collections.defaultdict[str, float] = collections.defaultdict(float)
        for _, obstacles in left:
            for operator in obstacles:
                wins[operator] += len(obstacles) == 1
                shares[operator] += 1 / len(obstacles)
        best = max(sorted(shares), key=lambda name: (wins[name] + shares[name] / 2, shares[name]))
        won = [item for item, obstacles in left if obstacles == {best}]
        steps.append((best, len(won), sum(item.is_vision for item in won)))
        left = [(item, obstacles - {best}) for item, obstacles in left if obstacles != {best}]
    return steps


def print_work_list(results: Sequence[Result], limit: int) -> None:
    """The work list, with the rate that would be reached after each operator."""
    failed = [r for r in results if r.status != PASSED]
    involved = collections.Counter(name for item in failed for name in item.obstacles)
    total, vision = len(results), sum(r.is_vision for r in results)
    passed, passed_vision = total - len(failed), sum(r.is_vision for r in results if r.status == PASSED)
    print("\nwork list: cases won (of vision), cases the operator stands in the way of, rates after it")
    for place, (operator, won, won_vision) in enumerate(work_list(failed)[:limit], 1):
        passed, passed_vision = passed + won, passed_vision + won_vision
        print(
            f"  {place:3d}. {operator:24} {won:4d} ({won_vision:3d}) {involved[operator]:5d}"
            f"   all {passed / total:6.1%}   vision {passed_vision / max(1, vision):6.1%}"
        )


def print_report(results: Sequence[Result], seconds: float, limit: int) -> None:
    """Rates, groups of failures and times."""
    failed = [r for r in results if r.status != PASSED]
    plain = [r for r in results if not r.is_expanded]
    usual = [r for r in results if set(r.types.split()) <= USUAL_TYPES]
    groups = {
        "all": results,
        "without expanded functions": plain,
        f"of {', '.join(sorted(USUAL_TYPES))} only": usual,
        "of these types, without expanded functions": [r for r in usual if not r.is_expanded],
    }
    print(f"\n{'passed':45} {'cases':22} cases of operators that vision models use")
    for title, group in groups.items():
        print(f"{title:45} {rate(group):22} {rate([r for r in group if r.is_vision])}")
    times = [r.convert_seconds for r in results if r.status == PASSED]
    if times:
        print(f"conversion, median of the passed: {statistics.median(times) * 1e3:.1f} ms; whole run {seconds:.0f} s")
    print_groups("failures by status", ((r.status, r.name) for r in failed), limit)
    print_groups("failures by operator of the case", ((f"{r.operator}: {r.status}", r.name) for r in failed), limit)
    print_groups("failures by reason", ((f"{r.status}: {_pattern(r.reason)}", r.name) for r in failed), limit)
    print_groups("failures by tensor types", ((r.types, r.name) for r in failed), limit)
    print_work_list(results, limit)


def _pattern(reason: str) -> str:
    """The reason without names and numbers, so that equal causes fall together."""
    first = reason.split(" | ", maxsplit=1)[0]
    return re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "#", re.sub(r"'[^']*'", "'...'", first))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="tflite", help="the target whose converter and runtime are judged (tflite)")
    parser.add_argument("--only", action="append", default=[], metavar="OP", help="cases of this operator; repeatable")
    parser.add_argument("--case", action="append", default=[], metavar="NAME", help="cases whose name contains this")
    parser.add_argument("--vision", action="store_true", help="only cases of operators vision models use")
    parser.add_argument("--bake", choices=get_args(Bake), default="parameters", help="operands that become constants")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds a case may take")
    parser.add_argument("--limit", type=int, default=60, help="groups shown in each list")
    parser.add_argument("--list-excluded", action="store_true", help="name every case that is left out")
    parser.add_argument("--show", action="store_true", help="one line for each failed case")
    parser.add_argument("--json", type=Path, help="write all results there")
    parser.add_argument("--fail-under", type=float, default=0.0, help="exit with 1 when fewer percent of all pass")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    cases, excluded = load_cases(options.bake)
    print_filter(cases, excluded, options.bake, options.list_excluded)
    chosen = [
        case
        for case in cases
        if (not options.only or case.operator in options.only)
        and (not options.case or any(part in case.name for part in options.case))
        and (not options.vision or case.is_vision)
    ]
    if not chosen:
        print("no case is chosen")
        return 2
    jobs = [Job(options.target, case.model, case.feeds, case.expected) for case in chosen]
    begin = time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    outcomes = run_jobs(judge, jobs, options.workers, options.timeout, _progress if sys.stderr.isatty() else None)
    results = [result(case, outcome) for case, outcome in zip(chosen, outcomes, strict=True)]
    print_report(results, time.monotonic() - begin, options.limit)
    if options.show:
        print()
        for item in results:
            if item.status != PASSED:
                print(f"{item.name}: {item.status}: {item.reason}")
    if options.json:
        _write(options, results, excluded)
    passed = sum(r.status == PASSED for r in results)
    return int(100 * passed / len(results) < options.fail_under)


def _progress(done: int, total: int) -> None:
    print(f"\r{done}/{total}", end="", file=sys.stderr, flush=True)


def _write(options: argparse.Namespace, results: Sequence[Result], excluded: Sequence[Excluded]) -> None:
    import onnx

    content = {
        "onnx": onnx.__version__,
        "target": options.target,
        "bake": options.bake,
        "rtol": RTOL,
        "atol": ATOL,
        "results": [asdict(item) for item in results],
        "excluded": [asdict(item) for item in excluded],
    }
    options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
