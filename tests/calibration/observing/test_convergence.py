"""Whether more samples would change the ranges is found out while they are counted."""

from __future__ import annotations

from edgeship.calibration.observing.convergence import Watch
from edgeship.calibration.planning.pinned import Pinned


class Growing:
    """An observer whose range grows until sample `until`."""

    def __init__(self, until: int) -> None:
        self.seen, self.until = 0, until

    def range(self) -> tuple[float, float]:
        return -1.0, 1.0 + 0.1 * min(self.seen, self.until)


def watched(until: int, samples: int = 80) -> Watch:
    observer = Growing(until)
    watch = Watch({"steady": Pinned(-1, 1), "growing": observer}, None)  # type: ignore[dict-item]  # only range is asked
    for done in range(1, samples + 1):
        observer.seen = done
        watch(done, samples)
    return watch


def test_ranges_that_stop_moving_early_have_converged() -> None:
    result = watched(until=15).result()
    assert result.converged
    assert result.findings() == []
    assert result.settled <= 30
    assert str(result).startswith("converged: the last ")
    assert "more samples would change nothing" in str(result)


def test_ranges_that_move_until_the_end_have_not_and_are_named() -> None:
    result = watched(until=80).result()
    assert not result.converged
    assert result.settled > 60  # the range grows to nine units: the last tenth of it comes after the 71st sample
    assert set(result.moving) == {"growing"}
    (finding,) = result.findings()
    assert finding.severity == "note"
    assert "samples ranges still moved (growing +" in finding.rule
    assert result.to_json()["converged"] is False


def test_a_range_that_moves_late_but_little_is_no_finding() -> None:
    result = watched(until=40 + 12).result()  # 1.0 of 7.2 units in the second half: 17 %
    assert not result.converged
    assert 0.1 < result.late < 0.25
    assert result.findings() == []
    assert str(result).startswith("nearly converged: after 5")


def test_the_count_is_handed_on() -> None:
    seen = []
    watch = Watch({}, lambda done, total, what="": seen.append((done, total, what)))
    watch(1, 2, "calibrate")
    watch(2, 2, "calibrate")
    assert seen == [(1, 2, "calibrate"), (2, 2, "calibrate")]
    assert watch.done == 2
