from __future__ import annotations

import pickle

from edgeship.calibration.errors import UnsupportedError
from edgeship.calibration.types import Finding


def test_a_refusal_crosses_process_borders_with_its_findings() -> None:
    error = UnsupportedError("cannot", [Finding("node a", "no such operator", "Foo", "Bar")])
    arrived = pickle.loads(pickle.dumps(error))
    assert str(arrived) == str(error)
    assert arrived.findings == error.findings
