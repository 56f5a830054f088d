"""Returns the typed face of onnxscript's rewrite rules: a pattern, a check that says why not, a replacement."""

from __future__ import annotations

from typing import Any

from onnxscript.rewriter import MatchResult, RewriteRule

Builder = Any
"""Makes a node, or the pattern of one, for each attribute it is asked for: `op.Conv(x, w)`; it has no type."""


class Rule:
    """A rewrite. onnxscript reads the names of `pattern`'s arguments and outputs, and hands over what matched by name.

    With `remove_nodes` a place is left alone when a node of the pattern other than the last has further consumers.
    """

    def __init__(self, name: str, *, remove_nodes: bool = True) -> None:
        self.name, self.remove_nodes = name, remove_nodes

    def pattern(self, *args: Any, **kwargs: Any) -> Any:
        """What is looked for."""
        raise NotImplementedError

    def check(self, *args: Any, **kwargs: Any) -> MatchResult:
        """Success, or why a place that has the pattern is left alone."""
        raise NotImplementedError

    def rewrite(self, *args: Any, **kwargs: Any) -> Any:
        """What takes the pattern's place."""
        raise NotImplementedError

    @classmethod
    def make(cls, *args: Any) -> RewriteRule:
        """The rule for onnxscript to apply; `args` are those of the class."""
        rule = cls(*args)
        return RewriteRule(rule.pattern, rule.rewrite, rule.check, name=rule.name, remove_nodes=rule.remove_nodes)


def refuse(reason: str) -> MatchResult:
    """A check's answer that leaves the place alone."""
    return MatchResult().fail(reason)
