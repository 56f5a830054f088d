"""Returns the form of the quantized model that is fastest on this machine among those that meet the gates.

First the forms of the weights: from the fastest on, each is judged on the evaluation samples until one meets the
recipe's gates. Then that one with each kind of layers in float (islands), and with all the kinds together that were
faster so; what is clearly faster is judged too. All forms of a round, and the float model, are measured in turns, each
in a process of its own.

The decision is kept under everything it depends on: the same inputs on the same kind of CPU decide the same again.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.calibration.errors import StageError
from edgeship.pipeline.quantizing.forms import Form, islands, kinds_in, make
from edgeship.pipeline.quantizing.prices import measure_artifacts
from edgeship.pipeline.quantizing.verdict import Judge

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.calibration.quantize import Calibration
    from edgeship.pipeline.stage import StageContext
    from edgeship.targets.base import Target

FASTER = 0.97
"""A form with layers in float must take less than this share of the time of the one without: less is noise."""
FLOAT = "fp32"


@dataclass
class Trial:
    """One form: its artifact's time, and why it was not taken (empty: it was, or was not judged)."""

    form: Form
    median_ms: float
    noisy: bool
    lost: str = ""

    def to_json(self) -> dict[str, Any]:
        """What was tried and why it lost; times are elsewhere."""
        return {"form": str(self.form), **self.form.to_json(), "lost": self.lost}


@dataclass
class Decision:
    """The form that was taken, all that were tried, and the float model's time."""

    form: Form
    trials: list[Trial]
    fp32_ms: float
    excluded: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The decision without times: the same whenever it is the same."""
        tried = [trial.to_json() for trial in self.trials]
        tried += [{"form": f"{name} weights", "weights": name, "lost": why} for name, why in self.excluded.items()]
        return {"chosen": str(self.form), **self.form.to_json(), "tried": tried}

    def times(self) -> list[dict[str, Any]]:
        """Every form's time."""
        own = [{"name": str(t.form), "median_ms": round(t.median_ms, 4), "noisy": t.noisy} for t in self.trials]
        return [{"name": FLOAT, "median_ms": round(self.fp32_ms, 4), "noisy": False}, *own]


class Auto:
    """The search for one target."""

    def __init__(self, context: StageContext, target: Target, calibration: Calibration, model: ir.Model) -> None:
        self._context = context
        self._target = target
        self._calibration = calibration
        self._float = model
        self._trials: dict[Form, Trial] = {}
        self._fp32_ms = 0.0

    def decide(self) -> Decision:
        """The decision, from the run folder where it was made before.

        Raises StageError when no form meets the gates.
        """
        key = self._key()
        kept = self._kept(key)
        if kept is not None:
            return kept
        forms, excluded = possible_forms(self._target.forms)
        with tempfile.TemporaryDirectory(prefix="edgeship-") as folder:
            decision = self._decide(Path(folder), forms, excluded)
        self._keep(key, decision)
        return decision

    def _decide(self, folder: Path, forms: Sequence[Form], excluded: Mapping[str, str]) -> Decision:
        judge = Judge(self._context, self._target, self._float)
        self._measure(folder, forms)
        base = self._first_that_meets_the_gates(folder, judge, self._by_time(forms))
        if base is None:
            listed = "\n".join(f"  - {trial.form}: {trial.lost}" for trial in self._trials.values())
            raise StageError(f'quantize.scheme = "auto": no form meets the gates on {self._target.name}\n{listed}')
        singles = islands(base, list(kinds_in(self._calibration.model, self._calibration.plan(base.scheme))))
        self._measure(folder, [base, *singles])
        won = [each for each in singles if self._ms(each) < FASTER * self._ms(base)]
        if 1 < len(won) < len(singles):
            both = Form(base.weights, tuple(kind for each in won for kind in each.keep_float))
            self._measure(folder, [base, both])
            won = [both, *won] if self._ms(both) < FASTER * self._ms(base) else won
        chosen = self._first_that_meets_the_gates(folder, judge, sorted(won, key=self._ms)) or base
        for trial in self._trials.values():
            if trial.form != chosen and not trial.lost:
                slower = trial.median_ms / self._ms(chosen)
                close = "no faster, to within 3 %" if slower < 1 / FASTER else f"slower: {slower:.2f} times the time"
                trial.lost = f"{close} of {chosen}" if close.startswith("slower") else f"{close}, than {chosen}"
        return Decision(chosen, list(self._trials.values()), self._fp32_ms, excluded)

    def _first_that_meets_the_gates(self, folder: Path, judge: Judge, forms: Iterable[Form]) -> Form | None:
        for form in forms:
            _, model = make(self._calibration, form, self._target.name)
            latency = {"int8": {"median_ms": self._ms(form)}, "speedup": self._fp32_ms / self._ms(form)}
            missed = judge.missed(model, self._path(folder, form), latency)
            if not missed:
                return form
            self._trials[form].lost = "; ".join(missed)
        return None

    def _by_time(self, forms: Sequence[Form]) -> list[Form]:
        """The fastest first; of forms as fast to within 3 % the one that the target names first, the more portable."""
        left, order = list(forms), list[Form]()
        while left:
            fastest = min(map(self._ms, left))
            taken = next(form for form in left if self._ms(form) <= fastest / FASTER)
            order.append(taken)
            left.remove(taken)
        return order

    def _measure(self, folder: Path, forms: Iterable[Form]) -> None:
        """Takes the times of `forms` and the float model in turns; rounds are made comparable by the float model."""
        from edgeship.targets.base import ConvertOptions

        paths = {FLOAT: folder / f"{FLOAT}{self._target.suffix}"}
        if not paths[FLOAT].exists():
            paths[FLOAT].write_bytes(self._target.convert(self._float, ConvertOptions()))
        named: dict[str, Form] = {}
        for form in forms:
            path = self._path(folder, form)
            if not path.exists():
                _, model = make(self._calibration, form, self._target.name)
                path.write_bytes(self._target.convert(model, ConvertOptions()))
            paths[str(form)] = path
            named[str(form)] = form
        times = measure_artifacts(self._context, self._target.name, paths)
        self._fp32_ms = self._fp32_ms or times[FLOAT][0]
        scale = self._fp32_ms / times[FLOAT][0]
        for name, form in named.items():
            self._trials.setdefault(form, Trial(form, times[name][0] * scale, times[name][1]))

    def _path(self, folder: Path, form: Form) -> Path:
        return folder / f"{form.weights}-{'-'.join(form.keep_float)}{self._target.suffix}"

    def _ms(self, form: Form) -> float:
        return self._trials[form].median_ms

    def _key(self) -> str:
        from edgeship.pipeline.flow import library_versions
        from edgeship.pipeline.judging import jury_digest
        from edgeship.pipeline.machine import cpu_key

        recipe = self._context.recipe
        plans = [self._calibration.plan(scheme).digest() for scheme in ("full", "pair_limited")]
        settings = recipe.dump("gates", "benchmark", "parity")
        judged = [jury_digest(recipe), recipe.data.seed]
        facts = [self._target.name, plans, settings, judged, cpu_key(), dict(library_versions())]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _kept(self, key: str) -> Decision | None:
        if self._context.cache is None:
            return None
        try:
            values = json.loads((self._context.cache / f"scheme-{key[:32]}.json").read_text())
            trials = [
                Trial(Form(t["weights"], tuple(t["keep_float"])), t["median_ms"], t["noisy"], t["lost"])
                for t in values["trials"]
            ]
            form = Form(values["form"]["weights"], tuple(values["form"]["keep_float"]))
            return Decision(form, trials, values["fp32_ms"], values["excluded"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _keep(self, key: str, decision: Decision) -> None:
        from edgeship.pipeline.workspace import write_json

        if self._context.cache is None:
            return
        trials = [{**t.to_json(), "median_ms": t.median_ms, "noisy": t.noisy} for t in decision.trials]
        content = {"form": decision.form.to_json(), "trials": trials, "fp32_ms": decision.fp32_ms}
        write_json(self._context.cache / f"scheme-{key[:32]}.json", {**content, "excluded": dict(decision.excluded)})


def possible_forms(forms: Sequence[Any]) -> tuple[list[Form], dict[str, str]]:
    """The target's forms that this CPU computes exactly, and why not the others."""
    from edgeship.pipeline.machine import cpu

    if cpu().has_exact_int8:
        return [Form(each) for each in forms], {}
    reason = "this CPU (AVX2, no VNNI) clips full-range int8 weights"
    clips = "pair_limited" in forms
    excluded = {"full": reason} if clips and "full" in forms else {}
    return [Form(each) for each in forms if each not in excluded], excluded
