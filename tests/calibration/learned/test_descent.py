"""Coordinate descent: never worse than its start, exact where coordinates do not meet, within the limits."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeship.calibration.learned.descent import Problem, descend
from edgeship.calibration.planning.pair_limit import can_overflow


def problem(seed: int, groups: int = 2, rows: int = 3, width: int = 70, *, paired: bool = False) -> Problem:
    """Weights that meet correlated inputs, quantized and not."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(groups, 200, 4)) @ rng.normal(size=(groups, 4, width)) + 0.2 * rng.normal(
        size=(groups, 200, width)
    )
    rounded = np.rint(x * 8) / 8
    weights = rng.normal(size=(groups, rows, width))
    scale = np.abs(weights).max(-1, keepdims=True) / 127
    turned = rounded.transpose(0, 2, 1)
    return Problem(*map(torch.from_numpy, (weights, scale, turned @ rounded / 200, turned @ x / 200)), 127, paired)


def objective(of: Problem, integers: torch.Tensor, ridge: float) -> torch.Tensor:
    diagonal = torch.diagonal(of.second, dim1=1, dim2=2).unsqueeze(1)
    return of.error(integers) + (ridge * diagonal * (integers * of.scale - of.weights) ** 2).sum(-1)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.03, 0.3]), st.booleans())
def test_no_channel_ends_worse_than_it_began(seed: int, ridge: float, paired: bool) -> None:
    given_problem = problem(seed, paired=paired)
    start = torch.round(given_problem.weights / given_problem.scale / (2 if paired else 1))
    found = descend(given_problem, start, ridge, sweeps=3)
    before, after = objective(given_problem, start, ridge), objective(given_problem, found, ridge)
    assert (after <= before + 1e-9 * before.abs()).all()
    assert found.abs().max() <= 127
    torch.testing.assert_close(found, torch.round(found))
    if paired:
        assert not can_overflow(found.flatten(0, 1).numpy()).any()


def test_correlated_inputs_leave_much_less_error_than_plain_rounding() -> None:
    given_problem = problem(1)
    start = torch.round(given_problem.weights / given_problem.scale)
    constant = (given_problem.weights @ given_problem.second * given_problem.weights).sum(-1)
    before, after = (
        given_problem.error(each) + constant for each in (start, descend(given_problem, start, 0.003, sweeps=10))
    )
    assert after.sum() < 0.7 * before.sum()


def test_inputs_that_do_not_meet_are_rounded_to_the_nearest() -> None:
    weights = torch.randn(1, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    diagonal = torch.diag(torch.arange(1.0, 10.0, dtype=torch.float64)).unsqueeze(0)
    scale = weights.abs().amax(-1, keepdim=True) / 127
    nearest = torch.round(weights / scale)
    found = descend(Problem(weights, scale, diagonal, diagonal, 127, False), nearest + 5, 0.01, sweeps=2)
    torch.testing.assert_close(found, nearest.clamp(-127, 127))


def test_what_no_single_step_can_improve_is_a_fixed_point() -> None:
    small = problem(5, groups=1, rows=1, width=3)
    found = descend(small, torch.zeros(1, 1, 3, dtype=torch.float64), 0.01, sweeps=50)
    least = objective(small, found, 0.01)
    for k, step in product(range(3), (-1, 1)):
        other = found.clone()
        other[..., k] = (other[..., k] + step).clamp(-127, 127)
        assert objective(small, other, 0.01) >= least - 1e-12


def test_an_input_that_is_always_zero_keeps_its_weight() -> None:
    one = problem(3, groups=1)
    for matrix in (one.second, one.cross):
        matrix[:, 7] = 0
        matrix[:, :, 7] = 0
    start = torch.round(one.weights / one.scale)
    found = descend(one, start, 0.03, sweeps=2)
    assert torch.equal(found[..., 7], start[..., 7])
    assert pytest.approx(0) == float((found[..., 7] - start[..., 7]).abs().max())


@pytest.mark.parametrize("paired", [False, True])
def test_a_pruned_weight_stays_zero(paired: bool) -> None:
    whole = problem(4, paired=paired)
    pruned = torch.rand(whole.weights.shape, generator=torch.Generator().manual_seed(0)) < 0.8
    sparse = replace(whole, weights=whole.weights.masked_fill(pruned, 0.0))
    start = torch.round(sparse.weights / sparse.scale / (2 if paired else 1))
    found = descend(sparse, start, 0.03, sweeps=3)
    assert (found[pruned] == 0).all()
    assert not torch.equal(found, start)
