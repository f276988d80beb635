r"""Lattice planes of a periodic density, in their true shape.

On a grid a density is a trigonometric polynomial. On a lattice plane it is one again, in the
coordinates :math:`s, t` along two lattice vectors :math:`A, B` in the plane: the coefficient of
the wave :math:`k` goes to :math:`(k\cdot A, k\cdot B)`. So a plane is exact between grid points
too, and is drawn on square pixels in angstrom, whatever the angle of A and B.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import gcd

import numpy as np
from numpy.typing import ArrayLike, NDArray

from densitykit.errors import ShapeError
from densitykit.plot.runs import as_floats

__all__ = ["Plane", "grid_plane", "images_near", "lattice_plane", "values_at"]


@dataclass(frozen=True)
class Plane:
    """One parallelogram of a lattice plane: `cell` (3, 3) in angstrom, and Miller indices `hkl`.

    Its corner `start` is in fractions of the cell; its sides A and B are the rows of the integers
    `steps` (2, 3). A plane of grid points has `grid_index`, axis and index.
    """

    cell: NDArray[np.float64]
    hkl: tuple[int, ...]
    start: NDArray[np.float64]
    steps: NDArray[np.integer]
    grid_index: tuple[int, int] | None = None

    @cached_property
    def frame(self) -> NDArray[np.float64]:
        """Unit vectors to the right (along A), upwards, and normal, as rows (3, 3)."""
        rows = np.linalg.qr((self.steps @ self.cell).T)[0].T
        rows = rows * np.sign(np.sum(rows * (self.steps @ self.cell), axis=1))[:, None]
        return np.array([*rows, np.cross(*rows)])

    @cached_property
    def sides(self) -> tuple[float, float, float]:
        """Length of A, and the parts of B to the right and upwards, in angstrom."""
        (wide, _), (shear, tall) = self.steps @ self.cell @ self.frame[:2].T
        return wide, 0.0 if abs(shear) < 1e-9 * wide else shear, tall

    @property
    def outline(self) -> NDArray[np.float64]:
        """Corners in the plane, shape (5, 2); the last is the first."""
        wide, shear, tall = self.sides
        return np.array([(0, 0), (wide, 0), (wide + shear, tall), (shear, tall), (0, 0)])

    @property
    def span(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lowest and highest coordinates to the right and upwards."""
        return self.outline.min(axis=0), self.outline.max(axis=0)

    @property
    def labels(self) -> list[str]:
        """Names of the directions to the right and upwards: x, y, z where they are these."""
        along = "abc"[self.steps[0].argmax()] if sum(abs(self.steps[0])) == 1 else None
        along = along or f"[{_spell(self.steps[0])}]"
        names = [f"along {along}", f"normal to {along}"]
        return [_cartesian(e) or name for e, name in zip(self.frame[:2], names, strict=True)]

    def title(self, unit: str) -> str:
        """Where the plane is, such as "z = 4.56 Å"."""
        if unit != "Å" and self.grid_index is not None:
            return f"{'xyz'[self.grid_index[0]]} = {self.grid_index[1]} ({unit})"
        normal = np.linalg.solve(self.cell, np.array(self.hkl, float))
        normal = normal / np.linalg.norm(normal)
        place = f"{self.start @ self.cell @ normal:.2f} {unit}".replace("-", "−")
        name = _cartesian(normal)
        plane = f"({_spell(self.hkl)}) plane, {place} from the origin"
        return f"{name} = {place}" if name else plane

    def project(
        self, numbers: NDArray[np.integer], positions: NDArray[np.float64], within: float
    ) -> tuple[NDArray[np.integer], NDArray[np.float64]]:
        """Numbers, and coordinates (n, 2), of atoms and images `within` angstrom of the plane."""
        corners = self.start + np.array([(0, 0), (1, 0), (0, 1), (1, 1)]) @ self.steps
        images = images_near(positions, self.cell, corners, within) - self.start @ self.cell
        x, y, far = (images @ self.frame.T).T
        wide, shear, tall = self.sides
        inside = abs(np.array([(x - y * shear / tall) / wide, y / tall]) - 0.5) < 0.5001
        near = inside.all(axis=0) & (abs(far) <= within)
        return np.resize(numbers, len(images))[near], np.stack([x, y], axis=-1)[near]

    def picture(
        self, field: NDArray[np.floating], pixels: int, smooth: bool = True
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float32]]:
        """Draw a field of shape (X, Y, Z) on square pixels.

        There are `pixels` of them along the longer side, and not fewer than grid points. Not
        `smooth`, and where the field is not finite, they take the values of grid points.

        Returns
        -------
        tuple
            Coordinates to the right (n,) and upwards (m,), and values (m, n): NaN where more than
            a pixel outside of the parallelogram.
        """
        wide, shear, tall = self.sides
        smooth = smooth and bool(np.isfinite(field).all())
        left, end = np.sort(self.outline[:, 0])[[0, -1]]
        step = max(end - left, tall) / pixels
        if self.grid_index is not None:
            step = min(step, *([wide, tall] / (abs(self.steps) @ field.shape)))
        x = np.linspace(left, end, int(np.ceil((end - left) / step - 1e-9)) + 1)
        y = np.linspace(0, tall, int(np.ceil(tall / step - 1e-9)) + 1)
        t = y / tall
        s = (x - shear * t[:, None]) / wide
        if smooth:
            waves = self._waves(field)
            p, q = (2j * np.pi * (np.arange(n) - n // 2) for n in waves.shape)
            rows = np.exp(np.outer(t, q)) @ waves.T * np.exp(np.outer(-t * shear / wide, p))
            values = (rows @ np.exp(np.outer(p, x / wide))).real
        else:
            points = s[..., None] * self.steps[0] + t[:, None, None] * self.steps[1] + self.start
            nearest = np.round(points * field.shape).astype(int) % field.shape
            values = field[tuple(np.moveaxis(nearest, -1, 0))]
        outside = abs(s - 0.5) > 0.5 + 1.01 * step / wide
        return x, y, np.where(outside, np.nan, values).astype(np.float32)

    def _waves(self, field: NDArray[np.floating]) -> NDArray[np.complex128]:
        """Coefficients in the plane, of waves -P .. P and -Q .. Q, shape (2 P + 1, 2 Q + 1)."""
        if self.grid_index is not None:
            return _coefficients(np.take(field, self.grid_index[1], axis=self.grid_index[0]))
        waves = _coefficients(field)
        k = np.stack(np.meshgrid(*(np.arange(n) - n // 2 for n in waves.shape), indexing="ij"), -1)
        pq = k @ self.steps.T
        most = abs(pq).max(axis=(0, 1, 2))
        plane = np.zeros(2 * most + 1, complex)
        np.add.at(plane, tuple((pq + most).T), (waves * np.exp(2j * np.pi * k @ self.start)).T)
        return plane


def images_near(
    positions: NDArray[np.float64],
    cell: NDArray[np.float64],
    corners: NDArray[np.float64],
    within: float,
) -> NDArray[np.float64]:
    """Images of all atoms in a box around corners (n, 3) in fractions; (k, 3) in angstrom.

    The order of the atoms is repeated, k / N times.
    """
    inverse = np.linalg.inv(cell)
    reach = within * np.linalg.norm(inverse, axis=0)
    low = np.floor(corners.min(axis=0) - reach - 1).astype(int)
    high = np.ceil(corners.max(axis=0) + reach).astype(int)
    images = np.array(list(product(*map(range, low, high + 1))))
    return (((positions @ inverse) % 1 + images[:, None]) @ cell).reshape(-1, 3)


def values_at(field: NDArray[np.floating], s: NDArray[np.float64]) -> NDArray[np.float64]:
    """The trigonometric polynomial of a field (X, Y, Z) at points (n, 3) in fractions."""
    waves = _coefficients(field)
    x, y, z = (
        np.exp(2j * np.pi * np.outer(t, np.arange(n) - n // 2))
        for t, n in zip(s.T, waves.shape, strict=True)
    )
    return np.einsum("nx,ny,nxy->n", x, y, np.einsum("xyz,nz->nxy", waves, z)).real


def _coefficients(field: NDArray[np.floating]) -> NDArray[np.complex128]:
    """Fourier coefficients, zero in the middle; those of Nyquist waves shared by both ends."""
    waves = np.fft.fftshift(np.fft.fftn(field)) / field.size
    for axis, n in enumerate(field.shape):
        if n % 2 == 0:
            first = np.take(waves, [0], axis) / 2
            waves = np.concatenate([first, np.delete(waves, 0, axis), first], axis)
    return waves


def _cartesian(direction: NDArray[np.float64]) -> str:
    """Name of a unit vector along a Cartesian axis; empty for others."""
    return "xyz"[int(direction.argmax())] if direction.max() > 1 - 1e-9 else ""


def _spell(indices: ArrayLike) -> str:
    """Miller indices such as 111 or 1 −1 0."""
    gap = "" if 0 <= min(indices) and max(indices) < 10 else " "
    return gap.join(f"{int(i)}".replace("-", "−") for i in indices)


def grid_plane(
    grid: tuple[int, ...], cell: NDArray[np.float64], axis: int | str, index: int | None
) -> Plane:
    """Plane of the grid points `index` (default: the middle) along a lattice vector, `axis`."""
    number = next((i for i, name in enumerate("xyz") if axis in (i, name)), None)
    if number is None:
        raise ShapeError(f"there is no axis {axis!r}; choose 'x', 'y' or 'z'")
    points = grid[number]
    index = points // 2 if index is None else index
    if index not in range(-points, points):
        raise ShapeError(f"{'xyz'[number]} has no plane {index}; choose from 0 to {points - 1}")
    index, one = int(index) % points, np.eye(3, dtype=int)
    start = one[number] * (index / points)
    return Plane(cell, tuple(one[number]), start, np.delete(one, number, 0), (number, index))


def lattice_plane(cell: NDArray[np.float64], hkl: ArrayLike, corner: ArrayLike) -> Plane:
    """Plane with Miller indices hkl, spanned by its two shortest lattice vectors.

    Its corner is in angstrom, shape (3,).
    """
    hkl, corner = as_floats(hkl, "hkl"), as_floats(corner, "through")
    if hkl.shape != (3,) or (hkl % 1).any() or not hkl.any() or abs(hkl).max() > 9:
        raise ShapeError(f"hkl is {hkl.tolist()}; pass three integers from -9 to 9, not all 0")
    if corner.shape != (3,) or not np.isfinite(corner).all():
        raise ShapeError(f"the plane goes through {corner.tolist()}; pass a point in angstrom")
    hkl = hkl.astype(int) // gcd(*map(int, hkl))
    reach = range(-abs(hkl).max() - 2, abs(hkl).max() + 3)
    steps = np.array([v for v in product(reach, repeat=3) if any(v) and not hkl @ v])
    # of vectors of one length those in positive directions first
    lengths = np.linalg.norm(steps @ cell, axis=1).round(9)
    steps = steps[np.lexsort((*-steps.T[::-1], -steps.sum(axis=1), lengths))]
    pairs = (steps[[i, j]] for j in range(len(steps)) for i in range(j))
    pair = next(p for p in pairs if np.array_equal(abs(np.cross(*p)), abs(hkl)))
    return Plane(cell, tuple(hkl), corner @ np.linalg.inv(cell), pair)
