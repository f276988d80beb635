"""Ensembles: score, spread and error against closed forms."""

import numpy as np
import pytest
import torch
from analytic import run_of

from densitykit.assess.ensembles import ensemble_scores
from densitykit.data.windows import Windows
from densitykit.errors import ShapeError
from densitykit.metrics import crps
from densitykit.models.baselines import Persistence


def test_crps_of_two_members_by_hand():
    assert crps(np.array([1.0, 3.0]), np.array(2.0)) == pytest.approx(1 - 2 / 2)
    assert crps(np.array([1.0, 2.0]), np.array(5.0)) == pytest.approx(3.5 - 1 / 2)


def test_crps_equals_the_sum_over_pairs():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 3, 2)), rng.normal(size=(3, 2))
    pairs = abs(x[:, None] - x).sum(axis=(0, 1)) / (2 * 7 * 6)
    np.testing.assert_allclose(crps(x, y), abs(x - y).mean(axis=0) - pairs, atol=1e-12)


@pytest.mark.parametrize("members", [3, 30])
def test_crps_does_not_reward_more_members_of_the_same_law(members):
    """Its mean for normal members and truth is 1/sqrt(pi) (Gneiting and Raftery 2007, eq. 21)."""
    rng = np.random.default_rng(members)
    x, y = rng.normal(size=(members, 200_000)), rng.normal(size=200_000)
    assert crps(x, y).mean() == pytest.approx(1 / np.sqrt(np.pi), abs=0.005)


def test_crps_wants_members():
    with pytest.raises(ShapeError, match="do not fit"):
        crps(np.ones((1, 4)), np.ones(4))
    with pytest.raises(ShapeError, match="do not fit"):
        crps(np.ones((3, 4)), np.ones(5))


class Noise(Persistence):
    """Adds normal noise of known deviation to a density of one, each step anew."""

    def __init__(self, deviation):
        super().__init__(2.0)
        self.deviation = deviation

    def step(self, state, generator=None):
        return 1 + self.deviation * torch.randn(state.shape, generator=generator)


@pytest.fixture
def windows():
    """Densities of 1 with noise of deviation 0.1, without memory."""
    noise = 0.1 * np.random.default_rng(0).normal(size=(40, 8, 8, 8))
    return Windows(run_of(1 + noise), 2.0, context=1)


@pytest.mark.parametrize(("deviation", "ratio"), [(0.1, 1.0), (0.05, 0.53), (0.2, 1.67)])
def test_spread_and_error_agree_for_members_of_the_same_law(windows, deviation, ratio):
    scores = ensemble_scores(Noise(deviation), windows, 5, members=6, starts=3, progress=False)
    mean = scores.groupby("metric").value.mean()
    # error**2 = s**2/M + 0.01, spread**2 = (1 + 1/M) s**2
    expected = np.sqrt((1 + 1 / 6) * deviation**2 / (deviation**2 / 6 + 0.01))
    assert mean["spread"] / mean["error"] == pytest.approx(expected, rel=0.02)
    assert expected == pytest.approx(ratio, abs=0.05)


def test_the_rows_are_tidy(windows):
    scores = ensemble_scores(Noise(0.1), windows, 4, members=3, starts=2, progress=False)
    assert list(scores.columns) == ["start", "lead", "metric", "value"]
    assert len(scores) == 2 * 4 * 4
    assert sorted(scores.lead.unique()) == [2, 4, 6, 8]
    assert sorted(scores.start.unique()) == [0, 70]


def test_seeds_repeat(windows):
    a, b, c = (
        ensemble_scores(Noise(0.1), windows, 2, members=3, starts=1, seed=s, progress=False).value
        for s in (1, 1, 2)
    )
    assert a.equals(b)
    assert not a.equals(c)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": 40}, "40 steps of 2 fs outlast the run of 40 frames; ask at most 39 steps"),
        ({"steps": 4, "members": 1}, r"1 member\(s\) have no spread"),
    ],
)
def test_what_does_not_fit_the_run(windows, arguments, words):
    with pytest.raises(ShapeError, match=words):
        ensemble_scores(Noise(0.1), windows, **arguments)


def test_the_longest_rollout_that_is_named_fits(windows):
    scores = ensemble_scores(Noise(0.1), windows, 39, members=2, progress=False)
    assert scores.lead.max() == 78 and set(scores.start) == {0}


def test_starts_are_times_of_the_present(windows):
    """With more frames of context, the present is a later frame."""
    run = run_of(np.ones((40, 4, 4, 4)), 2.0, start=100.0)
    scores = ensemble_scores(Noise(0.1), Windows(run, 4.0), 3, members=2, starts=2, progress=False)
    assert sorted(scores.start.unique()) == [104, 100 + 2 * (39 - 3 * 2)]
    assert sorted(scores.lead.unique()) == [4, 8, 12]
