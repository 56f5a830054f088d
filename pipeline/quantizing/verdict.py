"""Returns which gates of a recipe an artifact misses, before there is a run folder with every stage's results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.pipeline.gates import judge_gates
from edgeship.pipeline.judging import judge, open_jury

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.calibration.samples.data import Sample
    from edgeship.calibration.types import Array, Session
    from edgeship.pipeline.stage import StageContext
    from edgeship.targets.base import Target


class Judge:
    """Holds artifacts of one target against the recipe's gates, on the samples that all artifacts are judged on."""

    def __init__(self, context: StageContext, target: Target, model: ir.Model) -> None:
        self._context = context
        self._target = target
        self._float = model
        self._session: Session | None = None
        self._outputs: list[Mapping[str, Array]] = []

    def missed(self, quantized: ir.Model, artifact: Path, latency: Mapping[str, Any]) -> list[str]:
        """The gates that are not met, in words. Without gates nothing is run."""
        recipe = self._context.recipe
        if not recipe.gates:
            return []
        results: dict[str, Mapping[str, Any]] = {"convert": {"bytes": artifact.stat().st_size}, "latency": latency}
        results["parity"] = self._parity(quantized, artifact)
        if any(name.startswith("accuracy.") for name in recipe.gates):
            results["accuracy"] = self._accuracy(artifact)
        gates = judge_gates(recipe, self._target.name, results)
        return [str(gate).removeprefix(f"{self._target.name}: ") for gate in gates if not gate.met]

    def _accuracy(self, artifact: Path) -> Mapping[str, Any]:
        jury = open_jury(self._context.recipe, self._context.inputs["simplify"] / "model.onnx")
        name = self._target.name
        sessions = {name: self._target.open(artifact)}
        found: Mapping[str, Any] = judge(self._of_float, sessions, jury, self._context.progress)["targets"][name]
        return found

    def _of_float(self, place: int, sample: Sample) -> Mapping[str, Array]:
        """The float model's outputs, which are computed for the first artifact and kept for the others."""
        from edgeship.calibration.graph.onnx_file import to_bytes
        from edgeship.targets.onnxruntime import open_float

        if self._session is None:
            self._session = open_float(to_bytes(self._float))
        if place == len(self._outputs):
            self._outputs.append(self._session.run(sample.feeds))
        return self._outputs[place]

    def _parity(self, quantized: ir.Model, artifact: Path) -> Mapping[str, Any]:
        from edgeship.calibration.graph.onnx_file import to_bytes
        from edgeship.calibration.writing.qdq import output_steps
        from edgeship.pipeline.compare import Comparison
        from edgeship.pipeline.saturation import saturation_facts
        from edgeship.targets.onnxruntime import open_reference

        recipe = self._context.recipe
        jury = open_jury(recipe, self._context.inputs["simplify"] / "model.onnx")
        samples = jury.samples.take(recipe.parity.samples, recipe.data.seed)
        reference = open_reference(to_bytes(self._target.reference(quantized)))
        session, comparison = self._target.open(artifact), Comparison(output_steps(quantized), jury.decides)
        for done, sample in enumerate(samples):
            self._context.progress(done, len(samples), "parity of a form")
            comparison.update(reference.run(sample.feeds), session.run(sample.feeds))
        return {
            "max_steps": max(each.max_steps for each in comparison.differences().values()),
            "mean_steps": max(each.mean_steps for each in comparison.differences().values()),
            "agreement": comparison.agreement,
            "saturation": saturation_facts(self._target.name, quantized, samples),
            "int8_share": self._target.integer_share(artifact).share,
        }
