"""Densities in space: surfaces of equal density, atoms, bonds, the edges of the cell."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations, product
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray
from plotly.colors import sample_colorscale

from densitykit.errors import ShapeError
from densitykit.fields import resample
from densitykit.plot.runs import Drawable, as_runs
from densitykit.plot.theme import DENSITY_SCALE, PALETTE, TEMPLATE, TRUTH, heading
from densitykit.units import SYMBOLS

__all__ = ["contour", "isosurface"]

#: covalent radii in angstrom of the elements that are drawn with bonds (Cordero et al. 2008)
_RADII = {1: 0.31, 5: 0.84, 6: 0.76, 7: 0.71, 8: 0.66, 9: 0.57, 14: 1.11, 15: 1.07, 16: 1.05}
_RADII |= {17: 1.02, 34: 1.20, 35: 1.20, 53: 1.39}
_CORNERS = np.array(list(product((0, 1), repeat=3)))
#: six tetrahedra that share the diagonal of a cube: their corners, shape (6, 4, 3)
_TETRAHEDRA = np.array([np.tri(4, 3, -1, dtype=int)[:, p] for p in permutations(range(3))])
#: edges (above, below) that cut out triangles, by the number of corners above the level
_CUTS = {1: [(0, 1), (0, 2), (0, 3)], 3: [(0, 3), (1, 3), (2, 3)]}
_CUTS |= {2: [(0, 2), (0, 3), (1, 3), (0, 2), (1, 3), (1, 2)]}


def isosurface(
    density: Drawable,
    levels: Sequence[float] | None = None,
    *,
    reference: Drawable | None = None,
    cell: ArrayLike | None = None,
    atoms: bool = True,
    points: int = 48,
    title: str | None = None,
) -> go.Figure:
    """Draw surfaces of equal density in space, with atoms and cell; of a run, its first frame.

    Parameters
    ----------
    density, cell
        As in `densitykit.plot.slices`.
    levels
        In angstrom**-3. Default: those that enclose 30 % and 70 % of the electrons; of a
        difference, 20 % and 50 % of its largest value, of both signs.
    reference
        Draws the difference from this density: more in blue, less in orange.
    points
        Finer grids are Fourier resampled to this number of points along an axis, and the title
        says so. The page grows with its square: 1 MB or so for 24.

    Raises
    ------
    ShapeError
        Values that are not finite, unlike grids, or levels that the density does not reach.
    """
    both = {"density": density} | ({} if reference is None else {"reference": reference})
    run, *others = as_runs(both, cell).values()
    field = run.field().astype(float) - sum(other.field() for other in others)
    if not np.isfinite(field).all():
        raise ShapeError("the density is not finite; draw a frame without NaN and infinities")
    grid = tuple(int(np.clip(n, min(24, points), points)) for n in run.grid)
    field, signed = resample(field, grid), reference is not None
    levels = np.sort(_levels(field, signed) if levels is None else levels)
    order = np.argsort(-abs(levels))  # browsers blend traces in this order: the inner ones first
    surfaces = [
        _surface(field, levels[i], run.cell_at(), **_look(levels, i, signed)) for i in order
    ]
    traces = [_line(_edges(run.cell_at()), "#777", 2), *surfaces]
    if atoms and run.atoms() is not None:
        traces = [*_balls(*_inside(*run.atoms(), run.cell_at())), *traces]
    sizes = [" × ".join(map(str, shape)) for shape in (grid, run.grid)]
    fewer = f"drawn on {sizes[0]} of {sizes[1]} points" if np.less(grid, run.grid).any() else ""
    time = "" if run.times is None else f"t = {run.label()}"
    text = heading(title or ("Difference of densities" if signed else "Density"), time, fewer)
    extent = np.ptp(_CORNERS @ run.cell_at(), axis=0)
    eye = 0.48 * np.linalg.norm(extent) / np.prod(extent) ** (1 / 3) * np.array([0.6, -0.7, 0.37])
    camera = dict(eye=dict(zip("xyz", eye, strict=True)), projection_type="orthographic")
    axes = {f"{x}axis_visible": False for x in "xyz"}
    scene = dict(**axes, aspectmode="data", camera=camera)
    layout = dict(template=TEMPLATE, scene=scene, width=760, height=540, legend_y=0.95)
    return go.Figure(traces, layout | text | dict(margin=dict(l=10, r=10, t=60, b=10)))


def _levels(field: NDArray[np.float64], signed: bool) -> NDArray[np.float64]:
    if signed:
        return np.array([-0.5, -0.2, 0.2, 0.5]) * (abs(field).max() or 1.0)
    falling = np.sort(field, axis=None)[::-1]
    return falling[np.searchsorted(np.cumsum(falling) / falling.sum(), [0.7, 0.3])]


def _look(levels: NDArray[np.float64], i: int, signed: bool) -> dict[str, Any]:
    """Colour and opacity of a surface: the outer the lighter."""
    inner = np.ptp(abs(levels)) == 0 or (abs(levels[i]) - abs(levels).min()) / np.ptp(abs(levels))
    (colour,) = sample_colorscale(DENSITY_SCALE, [0.35 + 0.5 * float(inner)])
    if signed:
        colour = PALETTE[0] if levels[i] > 0 else PALETTE[1]
    return dict(color=colour, opacity=0.3 + 0.7 * float(inner))


def _surface(
    field: NDArray[np.float64], level: float, cell: NDArray[np.float64], **look: Any
) -> go.Mesh3d:
    if not field.min() < level < field.max():
        ends = f"{field.min():.3g} to {field.max():.3g}"
        raise ShapeError(f"no point has the level {level:g}; choose from {ends} per Å³")
    points, triangles = contour(np.pad(field, (0, 1), mode="wrap"), level)
    name = f"{level:.3g}".replace("-", "−") + " Å<sup>−3</sup>"
    return _mesh(points / field.shape @ cell, triangles, name, **look)


def _mesh(
    points: NDArray[np.float64], triangles: NDArray[np.integer], name: str, **look: Any
) -> go.Mesh3d:
    corners = dict(zip("xyz", points.T.astype(np.float32), strict=True))
    size = np.uint16 if len(points) < 2**16 else np.int32
    corners |= dict(zip("ijk", triangles.T.astype(size), strict=True))
    light = dict(ambient=0.55, diffuse=0.7, specular=0.15, roughness=0.6)
    look |= dict(name=name, hoverinfo="name", showlegend=True, lighting=light)
    return go.Mesh3d(**corners, **look)


def _line(points: NDArray[np.float64], colour: str, width: float) -> go.Scatter3d:
    """Separate strokes, shape (n, 2, 3)."""
    path = np.pad(points, ((0, 0), (0, 1), (0, 0)), constant_values=np.nan).reshape(-1, 3)
    look = dict(mode="lines", line=dict(color=colour, width=width), hoverinfo="skip")
    return go.Scatter3d(**dict(zip("xyz", path.T, strict=True)), **look, showlegend=False)


def _edges(cell: NDArray[np.float64]) -> NDArray[np.float64]:
    pairs = np.array([(a, b) for a in _CORNERS for b in _CORNERS if (b - a).min() == 0])
    return pairs[(pairs[:, 1] - pairs[:, 0]).sum(axis=1) == 1] @ cell


def contour(
    values: NDArray[np.floating], level: float
) -> tuple[NDArray[np.float64], NDArray[np.integer]]:
    """Surface of one level of values (X, Y, Z), by marching tetrahedra.

    Returns
    -------
    tuple
        Points (n, 3) in grid steps, and triangles (m, 3) of them, whose normals point to where
        the values are lower.
    """
    flat, at = values.ravel(), np.stack(np.indices(values.shape), axis=-1).reshape(-1, 3)
    strides = np.cumprod([1, *values.shape[:0:-1]])[::-1]
    first = np.arange(values.size).reshape(values.shape)[:-1, :-1, :-1].ravel()
    tetrahedra = (first[:, None, None] + _TETRAHEDRA @ strides).reshape(-1, 4)
    above = flat[tetrahedra] > level
    order = np.argsort(~above, axis=1, kind="stable")  # the corners above the level first
    tetrahedra, count = np.take_along_axis(tetrahedra, order, axis=1), above.sum(axis=1)
    edges = [tetrahedra[count == n][:, cuts].reshape(-1, 3, 2) for n, cuts in _CUTS.items()]
    edges = np.concatenate(edges)
    keys, triangles = np.unique(edges @ [values.size, 1], return_inverse=True)
    high, low = divmod(keys, values.size)
    part = ((flat[high] - level) / (flat[high] - flat[low]))[:, None]
    points, triangles = at[high] + part * (at[low] - at[high]), triangles.reshape(-1, 3)
    a, b, c = np.moveaxis(points[triangles], 1, 0)
    down = (at[edges[..., 1]] - at[edges[..., 0]]).sum(axis=1)
    wrong = np.sum(np.cross(b - a, c - a) * down, axis=1) < 0
    triangles[wrong] = triangles[wrong][:, ::-1]
    return points, triangles


def _inside(
    numbers: NDArray[np.integer], positions: NDArray[np.float64], cell: NDArray[np.float64]
) -> tuple[NDArray[np.integer], NDArray[np.float64]]:
    """Atoms inside the cell, with the images of those on its faces."""
    s = positions @ np.linalg.inv(cell)
    s = (s - np.floor(s + 1e-6) + _CORNERS[:, None]).reshape(-1, 3)
    inside = (s < 1 + 1e-6).all(axis=1)
    return np.tile(numbers, len(_CORNERS))[inside], s[inside] @ cell


def _balls(numbers: NDArray[np.integer], positions: NDArray[np.float64]) -> list[Any]:
    """A mesh of spheres for each species, and bonds between neighbouring non-metals."""
    ball, faces = contour(-np.linalg.norm(np.indices((7, 7, 7)) - 3, axis=0), -2.7)
    ball = (ball - 3) / np.linalg.norm(ball - 3, axis=1)[:, None]
    traces, colours = [], (PALETTE[3], TRUTH, *PALETTE[4:]) * 24
    for colour, number in zip(colours, np.unique(numbers), strict=False):
        radius, centres = 0.3 if number == 1 else 0.45, positions[numbers == number]
        points = centres[:, None] + radius * ball
        triangles = faces + len(ball) * np.arange(len(centres))[:, None, None]
        balls = points.reshape(-1, 3), triangles.reshape(-1, 3)
        traces.append(_mesh(*balls, SYMBOLS[number], color=colour))
    radii = np.array([_RADII.get(int(number), np.nan) for number in numbers])
    distances = np.linalg.norm(positions[:, None] - positions, axis=-1)
    pairs = np.argwhere(np.triu(distances < 1.2 * (radii[:, None] + radii), 1))
    return [*traces, _line(positions[pairs], "#555", 7)] if len(pairs) else traces
