"""Figures: the data in every trace, scales, frames, bands, messages, and the offline report."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
import xarray as xr
from plotly.offline import get_plotlyjs

from densitykit import __version__
from densitykit.errors import ShapeError
from densitykit.plot.figures import (
    PALETTE,
    TRUTH,
    comparison_figure,
    curve_film,
    distribution_figure,
    error_figure,
    film_figure,
    line_styles,
    panels_figure,
    series_figure,
    slice_figure,
    structure_factor_figure,
    training_figure,
    worst_slice,
    worst_slice_figure,
)
from experiments.report import write_report

GRID = (4, 6, 8)
EDGE = 9.0
TIMES = np.arange(5) * 6.0


@pytest.fixture
def fields() -> np.ndarray:
    """Five positive frames, shape (5, 4, 6, 8), in angstrom**-3."""
    return np.random.default_rng(0).uniform(0.01, 0.08, (5, *GRID))


def same(drawn: np.ndarray, expected: np.ndarray) -> None:
    """What is drawn is the float32 of what was given, and keeps its shape."""
    assert drawn.dtype == np.float32
    np.testing.assert_array_equal(drawn, np.asarray(expected, "f4"))


# --- planes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [np.asarray, lambda a: xr.DataArray(a, dims=("x", "y", "z"))])
@pytest.mark.parametrize(
    ("axis", "index", "cut", "labels"),
    [
        ("x", 1, np.s_[1], "yz"),
        ("y", None, np.s_[:, 3], "xz"),
        (2, -1, np.s_[:, :, 7], "xy"),
    ],
)
def test_slice_holds_the_plane(
    fields: np.ndarray, wrap: Callable, axis: int | str, index: int | None, cut: tuple, labels: str
) -> None:
    before = fields.copy()
    fig = slice_figure(wrap(fields[0]), axis, index, edge=EDGE)
    assert isinstance(fig, go.Figure)
    (heatmap,) = fig.data
    same(heatmap.z, fields[0][cut].T)  # first axis to the right, second upwards
    for letter, axis_layout, step in (
        (labels[0], fig.layout.xaxis, heatmap.dx),
        (labels[1], fig.layout.yaxis, heatmap.dy),
    ):
        assert axis_layout.title.text == f"{letter} (Å)"
        assert step == pytest.approx(EDGE / GRID["xyz".index(letter)])
    assert fig.layout.yaxis.scaleanchor == "x"
    bounds = (fields[0][cut].min(), fields[0][cut].max())
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == bounds
    np.testing.assert_array_equal(fields, before)


def test_slice_titles(fields: np.ndarray) -> None:
    assert slice_figure(fields[0], "z", 2, edge=EDGE).layout.title.text == "z = 2.25 Å"
    assert slice_figure(fields[0], "z", 2, edge=(1, 2, 4)).layout.title.text == "z = 1.00 Å"
    plain = slice_figure(fields[0], "y")
    assert plain.layout.title.text == "y = 3 (grid point)"
    assert plain.layout.xaxis.title.text == "x (grid point)"
    assert plain.data[0].dx == 1
    assert slice_figure(fields[0], title="Lithium").layout.title.text == "Lithium"


def test_panel_pixels_have_the_aspect_of_the_cell(fields: np.ndarray) -> None:
    for edge, aspect in ((EDGE, 1.0), (None, 6 / 4), ((1, 3, 1), 3.0)):
        layout = slice_figure(fields[0], "z", edge=edge).layout
        wide = layout.width - layout.margin.l - layout.margin.r
        tall = layout.height - layout.margin.t - layout.margin.b
        assert tall / wide == pytest.approx(aspect, rel=0.01)


def test_comparison(fields: np.ndarray) -> None:
    truth, prediction = fields[0], fields[1] * 1.5
    fig = comparison_figure(truth, prediction, "x", 2, edge=EDGE, names=("DFT", "model"))
    left, middle, right = fig.data
    same(left.z, truth[2].T)
    same(middle.z, prediction[2].T)
    same(right.z, abs(truth[2] - prediction[2]).T)
    assert (left.coloraxis, middle.coloraxis, right.coloraxis) == (
        *("coloraxis", "coloraxis"),
        "coloraxis2",
    )
    shared, own = fig.layout.coloraxis, fig.layout.coloraxis2
    assert shared.cmin == min(truth[2].min(), prediction[2].min())
    assert shared.cmax == max(truth[2].max(), prediction[2].max())
    assert (own.cmin, own.cmax) == (0, abs(truth[2] - prediction[2]).max())
    assert own.colorscale[0][1] == "#ffffff"
    error = np.sqrt(((truth - prediction) ** 2).sum() / (truth**2).sum())
    assert f"{100 * error:.3g} %" in fig.layout.title.subtitle.text
    assert [a.text for a in fig.layout.annotations] == ["DFT", "model", "|error|"]


def test_comparison_of_equal_and_of_diverged_fields(fields: np.ndarray) -> None:
    assert comparison_figure(fields[0], fields[0]).layout.coloraxis2.cmax > 0
    assert "nan %" in comparison_figure(0 * fields[0], fields[0]).layout.title.subtitle.text
    broken = fields[0].copy()
    broken[:, :, 4] = np.inf
    layout = comparison_figure(fields[0], broken).layout
    assert np.isfinite([layout.coloraxis.cmax, layout.coloraxis2.cmax]).all()
    assert layout.coloraxis.cmax == fields[0][:, :, 4].max()


def test_colour_bars_lie_below_their_panels(fields: np.ndarray) -> None:
    layout = comparison_figure(fields[0], fields[1], edge=EDGE).layout
    for bar, start, stop in (
        (layout.coloraxis.colorbar, layout.xaxis.domain[0], layout.xaxis2.domain[1]),
        (layout.coloraxis2.colorbar, *layout.xaxis3.domain),
    ):
        assert bar.orientation == "h"
        assert (bar.x - bar.len / 2, bar.x + bar.len / 2) == pytest.approx((start, stop))


@pytest.mark.parametrize(("axis", "index"), [("x", 3), ("y", 0), ("z", 5)])
def test_worst_slice_finds_a_planted_error(fields: np.ndarray, axis: str, index: int) -> None:
    truth = fields[0]
    prediction = truth + 1e-4 * np.sin(np.arange(truth.size)).reshape(GRID)
    plane = [slice(None)] * 3
    plane["xyz".index(axis)] = index
    prediction[tuple(plane)] -= 0.02
    assert worst_slice(truth, prediction) == (axis, index)
    fig = worst_slice_figure(truth, prediction, edge=EDGE)
    same(fig.data[2].z, abs(truth - prediction)[tuple(plane)].T)
    place = index * EDGE / GRID["xyz".index(axis)]
    assert fig.layout.title.text == f"Plane of largest error, {axis} = {place:.2f} Å"


def test_panels(fields: np.ndarray) -> None:
    runs = {"ab initio": fields, "with sJSD": xr.DataArray(fields[::-1]), "axes": fields * 2}
    fig = panels_figure(runs, TIMES, [0, -1], "y", 1, edge=EDGE)
    assert len(fig.data) == 6
    expected = [np.asarray(run)[pick][:, 1].T for run in runs.values() for pick in (0, -1)]
    for heatmap, picture in zip(fig.data, expected, strict=True):
        same(heatmap.z, picture)
        assert heatmap.coloraxis == "coloraxis"
    assert [a.text for a in fig.layout.annotations] == ["0 fs", "24 fs"]
    rows = [fig.layout[f"yaxis{i}"].title.text for i in ("", 3, 5)]
    assert rows == [f"<b>{name}</b><br>z (Å)" for name in runs]
    assert fig.layout.yaxis2.title.text is None
    shown = fields[[0, -1]][:, :, 1]  # the reference sets the range
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (shown.min(), shown.max())


def test_film(fields: np.ndarray) -> None:
    fig = film_figure(fields, TIMES, "z", 2, edge=EDGE)
    same(fig.data[0].z, fields[0, :, :, 2].T)
    assert len(fig.frames) == 5
    for frame, field in zip(fig.frames, fields, strict=True):
        same(frame.data[0].z, field[:, :, 2].T)
    (slider,) = fig.layout.sliders
    assert [step.label for step in slider.steps] == ["0", "6", "12", "18", "24"]
    assert [step.args[0][0] for step in slider.steps] == [frame.name for frame in fig.frames]
    assert len(fig.layout.updatemenus[0].buttons) == 2
    shown = fields[..., 2]
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (shown.min(), shown.max())


@pytest.mark.parametrize(("length", "frames", "stride"), [(40, 40, 1), (41, 21, 2), (100, 34, 3)])
def test_film_strides(length: int, frames: int, stride: int) -> None:
    run = np.arange(length * 8.0).reshape(length, 2, 2, 2)
    fig = film_figure(run, np.arange(length) * 3.0)
    assert len(fig.frames) == len(fig.layout.sliders[0].steps) == frames
    same(fig.frames[1].data[0].z, run[stride, :, :, 1].T)
    assert fig.layout.sliders[0].steps[1].label == f"{3 * stride}"
    assert len(film_figure(run, np.arange(length), max_frames=7).frames) <= 7


def test_films_side_by_side(fields: np.ndarray) -> None:
    fig = film_figure({"ab initio": fields, "model": 1 - fields}, TIMES, edge=EDGE)
    assert [a.text for a in fig.layout.annotations] == ["ab initio", "model"]
    same(fig.frames[3].data[1].z, 1 - fields[3, :, :, 4].T)
    assert fig.frames[3].traces == (0, 1)
    assert fig.layout.coloraxis.cmax == fields[..., 4].max()


def test_payload_is_small() -> None:
    cube = np.random.default_rng(0).random((40, 24, 24, 24))
    assert len(comparison_figure(cube[0], cube[1], edge=EDGE).to_json()) < 20_000
    assert len(film_figure(cube, np.arange(40.0), edge=EDGE).to_json()) < 200_000


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda f: slice_figure(f), ["density", "(5, 4, 6, 8)", "(X, Y, Z)"]),
        (lambda f: slice_figure(f[0, :0]), ["density", "(0, 6, 8)"]),
        (lambda f: slice_figure(f[0], "xy"), ["'xy'", "choose 'x'"]),
        (lambda f: slice_figure(f[0], 3), ["axis 3", "choose 'x'"]),
        (lambda f: slice_figure(f[0], "y", 6), ["y has no plane 6", "0 to 5"]),
        (lambda f: comparison_figure(f[0], f[0, :, :3]), ["prediction", "(4, 3, 8)", "one grid"]),
        (lambda f: worst_slice(f[0], f[0, 0]), ["prediction", "(6, 8)"]),
        (lambda f: film_figure(f, TIMES[:3]), ["density_time", "(3,)", "one time"]),
        (lambda f: film_figure(f[:0], TIMES[:0]), ["density_time", "non-empty"]),
        (lambda f: film_figure({}, TIMES), ["at least one field"]),
        (lambda f: panels_figure({"a": f, "b": f[:4]}, TIMES, [0]), ["b has", "one time"]),
        (lambda f: panels_figure({"a": f}, TIMES, [0, 5]), ["picks [0, 5]", "choose frames"]),
        (lambda f: panels_figure({"a": f}, TIMES, []), ["a has shape (0,"]),
        (lambda f: series_figure(TIMES, {"a": [1, 2]}, ""), ["a has shape (2,)", "(5,)"]),
        (lambda f: series_figure(TIMES, {"a": [TIMES] * 2}, ""), ["(2, 5)", "(mean, low, high)"]),
        (lambda f: error_figure(TIMES, {"a": (TIMES, [1], [2])}), ["a:", "one length"]),
        (lambda f: error_figure(f, {"a": TIMES}), ["abscissa (5, 4, 6, 8)"]),
        (lambda f: distribution_figure({"a": [1.0]}, [0.0]), ["centres", "two bins"]),
        (lambda f: training_figure([]), ["no rows"]),
        (lambda f: training_figure([{"step": 0, "loss": 1.0}], ["los"]), ["'los'", "loss"]),
    ],
)
def test_wrong_shapes_are_named(fields: np.ndarray, call: Callable, parts: list[str]) -> None:
    with pytest.raises(ShapeError) as caught:
        call(fields)
    for part in parts:
        assert part in str(caught.value)


# --- curves ----------------------------------------------------------------------------------


def test_line_styles() -> None:
    names = ["DFT", *"abcdefgh"]
    styles = line_styles(names, truth="DFT")
    assert styles["DFT"]["color"] == TRUTH
    assert [styles[name]["color"] for name in "abcdefg"] == list(PALETTE)
    assert styles["h"]["color"] == PALETTE[0]
    assert styles["h"]["dash"] != styles["a"]["dash"]
    assert len({(s["color"], s["dash"]) for s in styles.values()}) == len(names)
    assert line_styles("ab", truth="DFT") == {name: styles[name] for name in "ab"}


def test_distribution_is_a_density() -> None:
    centres = np.linspace(-6, 4, 101)
    density = np.exp(-(centres**2) / 2) / np.sqrt(2 * np.pi)
    probability = density * 0.1
    probability[:3] = 0
    fig = distribution_figure({"DFT": probability, "model": probability[::-1]}, centres)
    truth, model, normal = fig.data
    np.testing.assert_allclose(truth.y[3:], density[3:], rtol=1e-5)
    np.testing.assert_allclose(normal.y, density, rtol=1e-5)
    assert np.isnan(truth.y[:3]).all()  # zero has no logarithm: a gap, not a cliff
    assert (truth.line.color, model.line.color) == (TRUTH, PALETTE[0])
    assert fig.layout.yaxis.type == "log"
    low, high = 10.0 ** np.array(fig.layout.yaxis.range)
    assert low < density[3] and density.max() < high
    linear = distribution_figure({"DFT": probability}, centres, log=False, normal=False)
    assert len(linear.data) == 1
    assert linear.layout.yaxis.type != "log"
    assert linear.data[0].y.sum() * 0.1 == pytest.approx(1, abs=2e-3)


def test_structure_factor_bands() -> None:
    q = np.array([0.7, 1.0, 1.2])
    mean = np.array([0.1, 0.5, 2.0])
    curves = {"DFT": (mean, mean - 0.1, mean + 0.2), "model": mean * 2}
    fig = structure_factor_figure(q, curves)
    band, truth, model = fig.data  # bands below the curves
    assert band.fill == "toself"
    same(band.x, [*q, *q[::-1]])
    same(band.y, [*(mean + 0.2), *(mean - 0.1)[::-1]])
    assert band.showlegend is False and band.legendgroup == truth.name
    assert band.fillcolor == "rgba(51, 51, 51, 0.2)"
    same(truth.x, q)
    same(model.y, 2 * mean)
    assert truth.mode == model.mode == "lines+markers"
    assert "Å<sup>−1</sup>" in fig.layout.xaxis.title.text


def test_bands_skip_what_is_not_finite() -> None:
    mean, low, high = np.ones(5), np.full(5, 0.5), np.full(5, 2.0)
    low[1], high[4] = np.nan, np.inf
    band = series_figure(TIMES, {"a": (mean, low, high)}, "a (eV)").data[0]
    same(band.x, [*TIMES[:4], *TIMES[[4, 3, 2, 0]]])
    assert np.isfinite(band.y).all()


def test_errors_are_in_percent() -> None:
    error = np.array([0.0, 0.1, 0.2, 0.3, 0.3])
    curves = {"persistence": error, "model": np.stack([error, error - 0.15, error + 0.1])}
    fig = error_figure(xr.DataArray(TIMES), curves)
    band, persistence, model = fig.data
    np.testing.assert_allclose(persistence.y, 100 * error, rtol=1e-6)
    np.testing.assert_allclose(band.y[:5], 100 * error + 10, rtol=1e-6)
    assert [persistence.line.color, model.line.color] == list(PALETTE[:2])  # no reference
    assert fig.layout.xaxis.title.text == "t (fs)"
    assert "%" in fig.layout.yaxis.title.text
    styles = line_styles(["model", "persistence"])
    again = error_figure(TIMES, curves, styles=styles)
    assert again.data[2].line.color == PALETTE[0]


def test_logarithmic_errors() -> None:
    error = np.array([0.0, 0.1, 0.2, 0.3, 0.3])
    fig = error_figure(TIMES, {"model": (error, error - 0.15, error + 0.1)}, log=True)
    band, model = fig.data
    assert fig.layout.yaxis.type == "log"
    assert fig.layout.yaxis.dtick == "D2"  # one and a half decades: labels on 1, 2, 5
    assert np.isnan(model.y[0]) and model.y[1] == pytest.approx(10)
    assert 0 not in band.x and len(band.x) == 8
    assert band.y.min() == pytest.approx(1)  # a tenth of the smallest mean, not minus infinity
    wide = series_figure(TIMES, {"a": 10.0 ** -np.arange(5)}, "a", log=True)
    assert wide.layout.yaxis.dtick == 1


def test_series() -> None:
    curves = {"DFT": 0 * TIMES, "model": TIMES**2}
    fig = series_figure(TIMES, curves, "electron drift (electrons)")
    assert [trace.name for trace in fig.data] == ["DFT", "model"]
    same(fig.data[1].y, TIMES**2)
    assert fig.data[0].line.color == TRUTH
    assert fig.layout.yaxis.title.text == "electron drift (electrons)"


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
    for wrong in ({"a": rows[:2]}, {"a": rows[:, :4]}):
        with pytest.raises(ShapeError, match="a has shape"):
            curve_film(x, wrong, values)


def test_training_curve_is_a_running_median() -> None:
    loss = np.exp(-np.arange(100) / 30)
    spiky = loss.copy()
    spiky[50] = 1e3
    rows = [{"step": i, "loss": y, "learning_rate": 1e-3} for i, y in enumerate(spiky)]
    for i in range(9, 100, 10):
        rows[i]["validation_l2"] = 0.1 + i
    fig = training_figure(rows, window=5)
    assert [trace.name for trace in fig.data] == ["loss", "validation_l2"]
    smooth, points = fig.data
    np.testing.assert_allclose(smooth.y[2:48], loss[2:48], rtol=1e-6)
    assert smooth.y.max() <= 1
    assert points.mode == "lines+markers"
    np.testing.assert_array_equal(points.x, np.arange(9, 100, 10))
    np.testing.assert_allclose(points.y, points.x + 0.1, rtol=1e-6)
    assert fig.layout.yaxis.type == "log"
    (only,) = training_figure(rows, ["loss"], window=1).data
    same(only.y, spiky)


def test_training_log_as_read_from_csv() -> None:
    rows = [{"step": str(i), "loss": str(2.0 - i), "extra": "" if i else "3"} for i in range(2)]
    loss, extra = training_figure(rows).data
    same(loss.y, [2, 1])
    same(extra.y, [3])


def test_joined_training_logs() -> None:
    """Rows of several trainings repeat the steps; each loss is still a curve."""
    rows = [{"step": i, name: 1.0 + i} for name in "abc" for i in range(40)]
    curves = training_figure(rows, window=1).data
    assert [curve.name for curve in curves] == ["a", "b", "c"]
    for curve in curves:
        assert curve.mode == "lines"
        same(curve.y, 1.0 + np.arange(40))


def test_long_training_logs_are_thinned() -> None:
    rows = [{"step": i, "loss": 1.0 + i, "other": np.nan if i % 9 else i} for i in range(20_000)]
    loss, other = training_figure(rows).data
    assert len(loss.x) == 1000 and loss.x[1] == 20
    assert loss.y[500] == pytest.approx(10_001)
    assert other.mode == "lines+markers"


# --- report ----------------------------------------------------------------------------------


def test_report_is_complete_and_offline(tmp_path: Path, fields: np.ndarray) -> None:
    path = tmp_path / "report.html"
    sections = [
        ("Errors & <limits>", "<table><tr><td>5.3</td></tr></table>", None),
        ("A slice", "Below <5 % & above.\n\nSecond.", slice_figure(fields[0], edge=EDGE)),
        ("A film", "", film_figure(fields, TIMES)),
    ]
    write_report(path, "Lithium <800 K>", sections)
    page = path.read_text(encoding="utf-8")
    assert page.count(get_plotlyjs()) == 1
    rest = page.replace(get_plotlyjs(), "")
    assert not re.search(r"<(script|link|img|iframe)\b[^>]*\b(src|href)\s*=", rest)
    assert "cdn" not in rest.lower()
    assert "<title>Lithium &lt;800 K&gt;</title>" in rest
    for i, heading in enumerate(("Errors &amp; &lt;limits&gt;", "A slice", "A film")):
        assert f'<li><a href="#s{i}">{heading}</a></li>' in rest
        assert f'<h2 id="s{i}">{heading}</h2>' in rest
    assert "<td>5.3</td>" in rest
    assert "<p>Below &lt;5 % &amp; above.</p><p>Second.</p>" in rest
    assert rest.count("Plotly.newPlot(") == 2
    assert "Plotly.addFrames(" in rest and "Plotly.animate(" not in rest  # films wait for a click
    assert f"densitykit {__version__}" in rest
    write_report(tmp_path / "again.html", "Lithium <800 K>", sections)
    assert (tmp_path / "again.html").read_bytes() == path.read_bytes()


def test_report_without_figures_is_small(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", "Words", [("One", "<5 % is text, not a tag", None)])
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert len(page) < 5000
    assert "<p>&lt;5 % is text, not a tag</p>" in page


def test_report_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.html"
    write_report(path, "First", [])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("densitykit.plot.figures.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_report(path, "Second", [])
    assert "First" in path.read_text(encoding="utf-8")
    monkeypatch.undo()
    write_report(path, "Third", [])
    assert "Third" in path.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
