"""The demo: the plane that its report shows."""

import numpy as np
import pytest

from experiments.demo import worst_slice


@pytest.mark.parametrize(("axis", "index"), [("x", 3), ("y", 0), ("z", 7)])
def test_worst_slice(axis: str, index: int) -> None:
    truth = np.random.default_rng(0).uniform(0.01, 0.08, (4, 6, 8))
    prediction = truth + 1e-4 * np.sin(np.arange(truth.size)).reshape(truth.shape)
    plane = [slice(None)] * 3
    plane["xyz".index(axis)] = index
    prediction[tuple(plane)] -= 0.02
    assert worst_slice(truth, prediction) == (axis, index)
