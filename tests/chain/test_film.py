"""Films of curves: every frame holds its row, the slider its value."""

from __future__ import annotations

import numpy as np
import pytest

from densitykit.chain.film import curve_film
from densitykit.errors import ShapeError


def test_curve_film() -> None:
    x, values = np.linspace(0, 4, 5), np.array([1.0, 2.5, 4.0])
    rows = np.arange(15.0).reshape(3, 5)
    nuclei = np.array([[1.0, 3.0], [1.5, 3.0], [2.0, 3.0]])
    curves = {"a": rows, "b": -rows}
    fig = curve_film(x, curves, values, prefix="R = ", suffix=" bohr", markers={"nuclei": nuclei})
    assert [trace.name for trace in fig.data] == ["a", "b", "nuclei"]
    for n, frame in enumerate(fig.frames):
        for trace, expected in zip(frame.data, (rows[n], -rows[n]), strict=False):
            np.testing.assert_allclose(trace.y, expected)
        np.testing.assert_allclose(frame.data[2].x, nuclei[n])
    low, high = fig.layout.yaxis.range
    assert low < fig.data[2].y[0] < -14 < 14 < high
    (slider,) = fig.layout.sliders
    assert [step.label for step in slider.steps] == ["1", "2.5", "4"]
    assert (slider.currentvalue.prefix, slider.currentvalue.suffix) == ("R = ", " bohr")
    for wrong in ({"a": rows[:2]}, {"a": rows[:, :4]}, {"a": 1.0}):
        with pytest.raises(ShapeError, match="a has shape"):
            curve_film(x, wrong, values)
    with pytest.raises(ShapeError, match="nuclei has shape"):
        curve_film(x, curves, values, markers={"nuclei": 3.0})
    with pytest.raises(ShapeError, match="at least one curve"):
        curve_film(x, {}, values)
    with pytest.raises(ShapeError, match="values: .*'now'"):
        curve_film(x, curves, ["now", "soon", "later"])
