"""Densities in space: surfaces of equal density, atoms with their bonds, the edges of the cell.

Surfaces are found here, and closed where they leave the cell. Meshes take a tenth of the page that
whole grids would; what is still too large is drawn on fewer points, Fourier resampled.
`densitykit.plot.slices` says what figures take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray
from plotly.subplots import make_subplots
from scipy.ndimage import map_coordinates
from scipy.spatial import ConvexHull

from densitykit.errors import ShapeError
from densitykit.fields import resample
from densitykit.neighbours import neighbour_pairs
from densitykit.plot.runs import Drawable, Run, as_floats, as_runs, at_common_times
from densitykit.plot.theme import PALETTE, TEMPLATE, film, heading
from densitykit.units import COLOURS, RADII, SYMBOLS

__all__ = ["Space", "contour", "default_levels", "isosurface", "isosurface_film", "view"]

_NON_METALS = (1, 5, 6, 7, 8, 9, 14, 15, 16, 17, 33, 34, 35, 52, 53)
_CORNERS = np.array(list(product((0, 1), repeat=3)))
_LIGHT = dict(x=-3e4, y=6e4, z=-8e4)  # as the camera sees it: from the upper left, in front
_BYTES = 450_000  # of meshes in a page


class Space(NamedTuple):
    """How frames are drawn: surfaces of `levels`, found on `points` along the longest axis.

    Where there are no levels, there is one for each of the `shares`, see `isosurface`. Atoms are
    meshes of `corners` in all; 0 leaves discs of fixed size.
    """

    levels: ArrayLike | None
    atoms: bool
    repeat: tuple[int, ...]
    points: int
    shares: tuple[float, ...] = (0.2, 0.6)
    corners: int = 2500

    def grid(self, run: Run) -> tuple[int, ...]:
        """Points on which surfaces are found, never more than twice those of the density."""
        factor = min(2, self.points / max(run.grid))
        return tuple(max(round(factor * n), 4) for n in run.grid)

    def traces(self, run: Run, frame: int = 0) -> list[Any]:
        """Atoms, bonds, edges, and surfaces: as many traces for each frame of a run."""
        cell, field = run.cell_at(frame), run.field(frame).astype(float)
        field = resample(np.nan_to_num(field, posinf=0, neginf=0), self.grid(run))
        tiled = np.pad(np.tile(field, self.repeat), (0, 1), mode="wrap")
        traces = _atoms(run, frame, self) if self.atoms and run.atoms(frame) else []
        traces.append(_line(_edges(self.repeat) @ cell, "#888", 2))
        for level in self.levels[np.argsort(-abs(self.levels))]:
            # browsers blend in this order: the inner surfaces first
            look = _look(self.levels, level)
            sign = 1 if level > 0 or not run.signed else -1
            points, triangles = contour(sign * tiled, sign * level, closed=look["opacity"] == 1)
            name = f"{level:.3g}".replace("-", "−") + " Å<sup>−3</sup>"
            traces.append(_mesh(points / field.shape @ cell, triangles, name, **look))
        return traces


def isosurface(
    density: Drawable | Mapping[str, Drawable],
    levels: ArrayLike | None = None,
    *,
    cell: ArrayLike | None = None,
    atoms: bool = True,
    repeat: Sequence[int] = (1, 1, 1),
    points: int = 48,
) -> go.Figure:
    """Draw surfaces of equal density in space, with atoms and cell; of runs, their first frames.

    Parameters
    ----------
    density, cell
        As in `densitykit.plot.slices`; several densities are drawn side by side.
    levels
        In angstrom**-3. Default: those that enclose 20 % and 60 % of the electrons of the first
        density; of a difference, 50 % and 20 % of its largest value, of both signs.
    repeat
        Cells to draw along each lattice vector.
    points
        Surfaces are found on at most that many points along the longest edge of a cell, and on
        fewer where the page would pass 0.5 MB. The title says so where the density has more.

    Raises
    ------
    ShapeError
        Values that are not finite, unlike grids, or levels that the first density does not reach.
    """
    space = Space(levels, atoms, tuple(repeat), points)
    return _figure(as_runs(density, cell), [0], space)


def isosurface_film(
    density: Drawable | Mapping[str, Drawable],
    levels: ArrayLike | None = None,
    *,
    cell: ArrayLike | None = None,
    times: ArrayLike | None = None,
    atoms: bool = True,
    repeat: Sequence[int] = (1, 1, 1),
    points: int = 24,
    max_frames: int = 10,
) -> go.Figure:
    """Animate `isosurface`, with slider and play button; works in saved pages, without a kernel.

    Runs are shown at times that they have in common, with the levels of the first frame (default:
    one, around 20 % of the electrons), and longer ones than `max_frames` with a stride. Fewer
    frames leave more points to each.
    """
    runs = at_common_times(as_runs(density, cell, times))
    first, *_ = runs.values()
    shown = first.shown(max_frames)
    space = Space(levels, atoms, tuple(repeat), points, (0.2,), corners=0)
    fig = _figure(runs, shown, space)
    return fig.update_layout(height=560, margin_b=90)


def _figure(runs: Mapping[str, Run], shown: Sequence[int], space: Space) -> go.Figure:
    """Scenes of the first of the frames, and all frames of a film."""
    first, *_ = runs.values()
    if len(space.repeat) != 3 or min(space.repeat) < 1 or not space.points >= 4:
        problem = f"repeat={space.repeat}, points={space.points}"
        raise ShapeError(f"{problem}; pass three numbers of cells, and 4 points or more")
    space = space._replace(levels=_levels(first, shown[0], space))
    while True:
        films = [[space.traces(run, n) for run in runs.values()] for n in shown]
        parts = [trace for film in films for panel in film for trace in panel]
        size = 4 / 3 * sum(t[key].nbytes for t in parts for key in "xyzijk" if key in t)
        if size <= _BYTES or space.points <= 8:
            break
        less = min(0.9, (0.9 * _BYTES / size) ** 0.5)  # a surface has points squared
        space = space._replace(points=max(8, int(less * space.points)))
    fewer = " × ".join(map(str, space.grid(first)))
    few = f"drawn on {fewer} of {' × '.join(map(str, first.grid))} points"
    few = few if np.less(space.grid(first), first.grid).any() else ""
    time = first.moment(shown[0]) if len(shown) == 1 else ""
    text = heading("Difference of densities" if first.signed else "Density", time, few)
    fig = _scenes(films[0], first, space, columns=list(runs)).update_layout(text)
    if len(shown) == 1:
        return fig
    frames = [[trace for panel in panels for trace in panel] for panels in films]
    return film(fig, frames, [first.label(n) for n in shown], first.times is not None)


def _scenes(
    panels: Sequence[Sequence[Any]], run: Run, space: Space, columns: Sequence[str]
) -> go.Figure:
    """Scenes in a row, all seen from one place, with one legend."""
    n = len(panels)
    options = dict(specs=[[dict(type="scene")] * n], horizontal_spacing=0.01)
    fig = make_subplots(1, n, column_titles=list(columns), **options)
    for column, traces in enumerate(panels, start=1):
        fig.add_traces(traces, 1, column).update_traces(col=column, showlegend=column == 1)
    fig.update_traces(selector=dict(type="scatter3d", mode="lines"), showlegend=False)
    fig.update_scenes(**view(run, space))
    margin = dict(l=10, r=10, t=95 if any(columns) else 60, b=10)
    legend = dict(x=0, y=1, yanchor="top", bgcolor="rgba(255,255,255,0.7)")
    size = dict(width=min(1100, 640 if n == 1 else 480 * n), height=540)
    return fig.update_layout(template=TEMPLATE, margin=margin, legend=legend, **size)


def view(run: Run, space: Space) -> dict[str, Any]:
    """Layout of a scene: no axes, from above and the right, the whole cell in sight."""
    corners = _CORNERS * space.repeat @ run.cell_at()
    has_bonds = run.numbers is not None and np.isin(run.numbers, _NON_METALS).any()
    room = 1.5 if has_bonds else 0.6  # for atoms on faces, and beyond
    low, high = corners.min(axis=0) - room, corners.max(axis=0) + room
    ratio = dict(zip("xyz", 2.6 * (high - low) / np.linalg.norm(high - low), strict=True))
    camera = dict(eye=dict(x=1.5, y=-1.8, z=0.9), projection_type="orthographic")
    ends = zip("xyz", low, high, strict=True)
    axes = {f"{x}axis": dict(visible=False, range=[a, b]) for x, a, b in ends}
    return dict(**axes, aspectmode="manual", aspectratio=ratio, camera=camera)


def _levels(run: Run, frame: int, space: Space) -> NDArray[np.float64]:
    """Levels in rising order, which the field reaches; default levels where there are none."""
    field = resample(run.finite_field(frame), space.grid(run))
    if space.levels is None:
        return default_levels(field, run.signed, space.shares)
    levels = np.sort(as_floats(space.levels, "levels"), axis=None)
    if not (levels.size and field.min() < levels[0] and levels[-1] < field.max()):
        ends = f"{field.min():.3g} to {field.max():.3g}"
        raise ShapeError(f"no point has the level {levels}; choose from {ends} per Å³")
    return levels


def default_levels(
    field: NDArray[np.floating], signed: bool, shares: tuple[float, ...]
) -> NDArray[np.float64]:
    """Levels around shares of the electrons; of a difference, parts of its largest value."""
    if signed:
        sizes = (abs(field).max() or 1.0) * np.array([0.2, 0.5][-len(shares) :])
        return np.array([*-sizes[::-1], *sizes])
    falling = np.sort(field, axis=None)[::-1]
    places = np.searchsorted(np.cumsum(falling) / (falling.sum() or 1), shares[::-1])
    return falling[np.minimum(places, falling.size - 1)]


def _look(levels: NDArray[np.float64], level: float) -> dict[str, Any]:
    """Colour by sign, and opacity: the outer the lighter."""
    sizes = abs(levels)
    inner = 1.0 if np.ptp(sizes) == 0 else float((abs(level) - sizes.min()) / np.ptp(sizes))
    return dict(color=PALETTE[0] if level > 0 else PALETTE[1], opacity=0.2 + 0.8 * inner)


def _mesh(
    points: NDArray[np.float64], triangles: NDArray[np.integer], name: str, **look: Any
) -> go.Mesh3d:
    corners = dict(zip("xyz", points.T.astype(np.float32), strict=True))
    size = np.uint16 if len(points) < 2**16 else np.int32
    corners |= dict(zip("ijk", triangles.T.astype(size), strict=True))
    light = dict(ambient=0.55, diffuse=0.85, specular=0.1, roughness=0.5, facenormalsepsilon=0)
    look |= dict(name=name, hoverinfo="name", showlegend=True, lighting=light)
    return go.Mesh3d(**corners, **look, lightposition=_LIGHT)


def _line(points: NDArray[np.float64], colour: str, width: float) -> go.Scatter3d:
    """Separate strokes, shape (n, 2, 3)."""
    path = np.pad(points, ((0, 0), (0, 1), (0, 0)), constant_values=np.nan).reshape(-1, 3)
    path = dict(zip("xyz", path.T.astype(np.float32), strict=True))
    look = dict(mode="lines", line=dict(color=colour, width=width), hoverinfo="skip")
    return go.Scatter3d(**path, **look, showlegend=False)


def _edges(repeat: tuple[int, ...]) -> NDArray[np.integer]:
    """Edges of repeated cells, in lattice vectors, shape (n, 2, 3)."""
    pairs = np.array([(a, b) for a in _CORNERS for b in _CORNERS if (b - a).min() == 0])
    pairs = pairs[(pairs[:, 1] - pairs[:, 0]).sum(axis=1) == 1]
    images = np.array(list(product(*map(range, repeat))))
    return np.unique((pairs + images[:, None, None]).reshape(-1, 2, 3), axis=0)


def contour(
    values: NDArray[np.floating], level: float, closed: bool = True
) -> tuple[NDArray[np.float64], NDArray[np.integer]]:
    """Surface around all values (X, Y, Z) above a level, closed on the faces of the box, or open.

    Surface nets (Gibson 1998): a point in each cube that the surface crosses, in the mean of where
    its edges do; four cubes around an edge make two triangles. Inside the box a step of Newton on
    a cubic spline brings points to the level.

    Returns
    -------
    tuple
        Points (n, 3) in grid steps, and triangles (m, 3) of them, whose normals point to where
        the values are lower.
    """
    above = np.pad(values > level, 1, mode="constant" if closed else "edge")
    flat = np.minimum(np.pad(values, 1, mode="edge"), np.where(above, np.inf, level)).ravel()
    strides = np.cumprod([1, *above.shape[:0:-1]])[::-1]
    crossings, cubes = [], []
    for axis in range(3):
        edges = np.argwhere(np.diff(above, axis=axis))
        if not closed:
            edges = edges[((edges > 0) & (edges <= values.shape)).all(axis=1)]
        low = edges @ strides
        start, end = flat[low], flat[low + strides[axis]]
        crossings.append(edges + ((level - start) / (end - start))[:, None] * np.eye(3)[axis])
        p, q = strides[axis - 2], strides[axis - 1]
        around = low[:, None] - [0, p, p + q, q]
        cubes.append(np.where((start > end)[:, None], around, around[:, ::-1]))
    crossings, cubes = np.concatenate(crossings), np.concatenate(cubes)
    _, corners, counts = np.unique(cubes, return_inverse=True, return_counts=True)
    corners = corners.reshape(-1, 4)
    sums = [np.bincount(corners.ravel(), np.repeat(x, 4)) for x in crossings.T]
    points = np.stack(sums, axis=-1) / counts[:, None] - 1
    last = np.array(values.shape) - 1
    free = ((points > 0) & (points < last)).all(axis=1)
    at, slopes = points[free].T, np.gradient(values)
    slope = np.stack([map_coordinates(x, at, order=1) for x in slopes], axis=-1)
    step = (level - map_coordinates(values, at, mode="nearest"))[:, None] * slope
    points[free] += np.clip(step / np.maximum((slope**2).sum(axis=1), 1e-300)[:, None], -0.3, 0.3)
    points = np.clip(points, 0, last)
    return points, corners[:, [[0, 1, 2], [0, 2, 3]]].reshape(-1, 3)


@lru_cache
def _ball(n: int) -> tuple[NDArray[np.float64], NDArray[np.integer]]:
    """Sphere of radius 1 of n points on a spiral."""
    turn = np.arange(n) + 0.5
    z, angle = 1 - 2 * turn / n, np.pi * (1 + 5**0.5) * turn
    points = np.stack([np.cos(angle), np.sin(angle), z], axis=-1)
    points[:, :2] *= np.sqrt(1 - z**2)[:, None]
    faces = ConvexHull(points).simplices
    inward = np.linalg.det(points[faces]) < 0
    return points, np.where(inward[:, None], faces[:, ::-1], faces)


def _spheres(
    centres: NDArray[np.float64], radius: float, name: str, colour: str, space: Space, n: int
) -> go.Mesh3d | go.Scatter3d:
    """Spheres of one species; there are n of all."""
    if not space.corners:
        marker = dict(size=36 * radius, color=colour, line=dict(color="#444", width=1), opacity=1)
        places = dict(zip("xyz", centres.T.astype(np.float32), strict=True))
        look = dict(name=name, hoverinfo="name", showlegend=True)
        return go.Scatter3d(**places, mode="markers", marker=marker, **look)
    ball, faces = _ball(int(np.clip(space.corners // n, 24, 150)))
    points = (centres[:, None] + radius * ball).reshape(-1, 3)
    triangles = faces + len(ball) * np.arange(len(centres))[:, None, None]
    return _mesh(points, triangles.reshape(-1, 3), name, color=colour)


def _atoms(run: Run, frame: int, space: Space) -> list[Any]:
    """Spheres for each species, and halves of bonds between non-metals.

    Images of atoms on the faces of the cells are drawn as well, and the atoms outside of them that
    one or two bonds join to those inside: molecules are whole.
    """
    (numbers, positions), cell = run.atoms(frame), run.cell_at(frame)
    radii, s = np.array([float(RADII[n]) / 100 for n in numbers]), positions @ np.linalg.inv(cell)
    s -= np.floor(s + 1e-6)
    rows = [(a, *t) for t in product(*(range(n + 1) for n in space.repeat)) for a in range(len(s))]
    images = np.array(rows, int).reshape(-1, 4)  # an atom and lattice vectors
    images = images[(s[images[:, 0]] + images[:, 1:] < np.array(space.repeat) + 1e-6).all(axis=1)]
    non_metal, has_bonds = np.isin(numbers, _NON_METALS), bool({*run.numbers} & {*_NON_METALS})
    i, j, n = np.empty(0, int), np.empty(0, int), np.empty((0, 3), int)
    if has_bonds:
        i, j, n = neighbour_pairs(s @ cell, cell, 2.4 * radii.max(initial=0.1), both_ways=True)
    vectors = (s[j] - s[i] + n) @ cell
    bonded = np.linalg.norm(vectors, axis=1) < 1.2 * (radii[i] + radii[j])
    bonded &= non_metal[i] & non_metal[j]
    i, j, n, vectors = i[bonded], j[bonded], n[bonded], vectors[bonded]
    for _ in range(2):
        atom, bond = np.nonzero(images[:, :1] == i)
        joined = np.column_stack([j[bond], images[atom, 1:] + n[bond]])
        images = np.unique(np.concatenate([images, joined]), axis=0).astype(int)
    centres, traces = (s[images[:, 0]] + images[:, 1:]) @ cell, []
    for number in np.unique(run.numbers):
        radius = 0.2 + 0.2 * radii[numbers == number].max(initial=0)
        middle, look = centres[numbers[images[:, 0]] == number], (SYMBOLS[number], COLOURS[number])
        traces.append(_spheres(middle, radius, *look, space, len(centres)))
    atom, bond = np.nonzero(images[:, :1] == i)
    ends = np.stack([centres[atom], centres[atom] + vectors[bond] / 2], axis=1)
    return [*traces, _line(ends, "#555", 7)] if has_bonds else traces
