"""Returns the typed face of onnxscript's rewrite rules: a pattern, a check that says why not, a replacement."""

from __future__ import annotations

from typing import Any

from onnxscript.rewriter import MatchResult, RewriteRule, RewriteRuleClassBase

Builder = Any
"""Makes a node, or the pattern of one, for each attribute it is asked for: `op.Conv(x, w)`; it has no type."""


class Rule(RewriteRuleClassBase):
    """A rewrite. onnxscript reads the names of `pattern`'s arguments and outputs, and hands over what matched."""

    def pattern(self, *args: Any, **kwargs: Any) -> Any:
        """What is looked for."""
        raise NotImplementedError

    def check(self, *args: Any, **kwargs: Any) -> MatchResult:
        """Success, or why a place that has the pattern is left alone."""
        return MatchResult()

    def rewrite(self, *args: Any, **kwargs: Any) -> Any:
        """What takes the pattern's place."""
        raise NotImplementedError

    @classmethod
    def make(cls, *args: Any) -> RewriteRule:
        """The rule for onnxscript to apply."""
        return cls.rule(*args)  # type: ignore[no-untyped-call,no-any-return]  # onnxscript's own method


def refuse(reason: str) -> MatchResult:
    """A check's answer that leaves the place alone."""
    return MatchResult().fail(reason)
