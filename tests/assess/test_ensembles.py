"""Ensembles: score, spread and error against closed forms."""

import numpy as np
import pytest
import torch

from densitykit.assess.ensembles import ensemble_scores
from densitykit.data.windows import StatePairs
from densitykit.errors import ShapeError
from densitykit.metrics import crps


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


class Noise:
    """Adds normal noise of known deviation to the density, each step anew."""

    def __init__(self, deviation):
        self.deviation, self.horizon = deviation, 2.0

    def __call__(self, state, generator):
        out = state.clone()
        out[:, 0] = 1 + self.deviation * torch.randn(state[:, 0].shape, generator=generator)
        return out


@pytest.fixture
def pairs():
    """States whose density is 1 with noise of deviation 0.1, without memory."""
    generator = torch.Generator().manual_seed(0)
    states = torch.ones(40, 2, 8, 8, 8)
    states[:, 0] += 0.1 * torch.randn(40, 8, 8, 8, generator=generator)
    return StatePairs(states, 2.0 * np.arange(40), 2.0)


@pytest.mark.parametrize(("deviation", "ratio"), [(0.1, 1.0), (0.05, 0.53), (0.2, 1.67)])
def test_spread_and_error_agree_for_members_of_the_same_law(pairs, deviation, ratio):
    scores = ensemble_scores(Noise(deviation), pairs, 5, members=6, starts=3, progress=False)
    mean = scores.groupby("metric").value.mean()
    # error**2 = s**2/M + 0.01, spread**2 = (1 + 1/M) s**2
    expected = np.sqrt((1 + 1 / 6) * deviation**2 / (deviation**2 / 6 + 0.01))
    assert mean["spread"] / mean["error"] == pytest.approx(expected, rel=0.02)
    assert expected == pytest.approx(ratio, abs=0.05)


def test_the_rows_are_tidy(pairs):
    scores = ensemble_scores(Noise(0.1), pairs, 4, members=3, starts=2, progress=False)
    assert list(scores.columns) == ["start", "lead", "metric", "value"]
    assert len(scores) == 2 * 4 * 4
    assert sorted(scores.lead.unique()) == [2, 4, 6, 8]
    assert sorted(scores.start.unique()) == [0, 70]


def test_seeds_repeat(pairs):
    a, b, c = (
        ensemble_scores(Noise(0.1), pairs, 2, members=3, starts=1, seed=s, progress=False).value
        for s in (1, 1, 2)
    )
    assert a.equals(b)
    assert not a.equals(c)


@pytest.mark.parametrize("arguments", [{"steps": 40}, {"steps": 4, "members": 1}])
def test_what_does_not_fit_the_run(pairs, arguments):
    with pytest.raises(ShapeError, match="do not fit a run of 40 states"):
        ensemble_scores(Noise(0.1), pairs, **arguments)
