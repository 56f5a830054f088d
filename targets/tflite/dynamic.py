"""What of a file depends on the sizes that stood for its dynamic dimensions.

TFLite recomputes shapes from the operators when an input is resized, so a file is right for every size when the same
operators, with the same options and constants, come out of the model at two different ones. Where they differ, a
size has become a constant of the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

from edgeship.calibration.types import Finding

ACCEPTED = "static dimensions: edgeship convert --batch N, where only the batch is dynamic"


@dataclass(frozen=True)
class Written:
    """All that a file's operators are, but for shapes: `operators` in order, and which node wrote them.

    `marks` are the nodes' names with the number of operators that were written up to and with them.
    """

    operators: Sequence[tuple[Any, ...]]
    marks: Sequence[tuple[str, int]]

    def node_of(self, index: int) -> str:
        """The name of the node that wrote operator `index`."""
        return next((name for name, end in self.marks if index < end), "the model's outputs")


def differences(first: Written, second: Written) -> list[Finding]:
    """A finding for each node that is written differently for other sizes."""
    if [name for name, _ in first.marks] == [name for name, _ in second.marks]:
        names = list(_nodes(first, second))
    else:
        index = next(i for i, (a, b) in enumerate(zip_longest(first.operators, second.operators)) if a != b)
        names = [first.node_of(index)]
    rule = "has a size among its constants that is dynamic in the model"
    return [Finding(name, rule, "", ACCEPTED) for name in dict.fromkeys(names)]


def _nodes(first: Written, second: Written) -> Iterator[str]:
    """The nodes whose operators differ; both files were written by the same ones."""
    ends = [(0, 0), *((a, b) for (_, a), (_, b) in zip(first.marks, second.marks, strict=True))]
    ends.append((len(first.operators), len(second.operators)))
    for (a, b), (c, d) in pairwise(ends):
        if first.operators[a:c] != second.operators[b:d]:
            yield first.node_of(a)
