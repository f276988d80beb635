"""Densities of other programs: cube files and VASP's CHGCAR in, cube files out. Parsed by ASE.

What goes wrong between programs, and is taken care of here: cube files hold bohr**-3 and an origin
that need not be zero, CHGCAR holds density times volume, in the order of Fortran, and CHG may
hold many frames. A trajectory has one grid, one cell and one set of atoms. The electron
count of the first frame is worth a look (`n_electrons`): near a whole number for valence
densities of pseudopotentials on the grid they were computed on, off by percents for all-electron
densities, whose cusps no such grid resolves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from tqdm.auto import tqdm

from densitykit.errors import DensityKitError, TrajectoryError
from densitykit.store import PathLike
from densitykit.trajectory import (
    TrajectoryWriter,
    create_trajectory,
    extend_trajectory,
    open_trajectory,
    write_splits,
)

__all__ = ["Frame", "convert", "read_frames", "split_in_time", "write_cube"]

_CUBE, _VASP = (".cube", ".cub"), ("CHG", "AECCAR", "PARCHG")


class Frame(NamedTuple):
    """density (X, Y, Z) in angstrom**-3; cell, rows, and positions (atom, 3) in angstrom."""

    density: NDArray[np.float64]
    cell: NDArray[np.float64]
    numbers: NDArray[np.int64]
    positions: NDArray[np.float64]


def read_frames(path: PathLike) -> list[Frame]:
    """Read all densities of one file.

    Parameters
    ----------
    path
        A cube file (`*.cube`, `*.cub`; the first field is taken for the density), or one of VASP
        whose name holds CHG, AECCAR or PARCHG (the total density of a spin-polarised one).

    Raises
    ------
    TrajectoryError
        The file is missing, cut short, or of another kind.
    """
    path = Path(path)
    kind = _kind(path)
    try:
        frames = _read_cube(path) if kind == "cube" else _read_vasp(path)
    except DensityKitError:
        raise
    except (OSError, ValueError, IndexError, KeyError, AssertionError) as error:
        raise TrajectoryError(
            f"{path}: not a readable {kind} file ({error}); write it again"
        ) from error
    if not frames or not all(np.isfinite(frame.density).all() for frame in frames):
        raise TrajectoryError(f"{path}: no density, or one cut short; write the file again")
    return frames


def convert(
    paths: Sequence[PathLike],
    out: PathLike,
    *,
    time_step: float,
    start: float = 0.0,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Make a trajectory of files, in the order given; a killed conversion continues.

    Parameters
    ----------
    paths
        See `read_frames`. A file may hold several frames.
    out
        The trajectory.
    time_step
        Time between frames, fs.
    start
        Time of the first frame, fs.
    progress
        Show a progress bar over the files.
    **options
        Of `create_trajectory`: `quantity`, `keepbits`, `allow_negative`, `pbc`, `attrs`, ...

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    TrajectoryError
        No files, one that cannot be read, or one with another cell, grid or atoms.
    """
    if not paths or time_step <= 0:
        raise TrajectoryError(f"{len(paths)} files, {time_step} fs apart; give some, and a time")
    out, known = Path(out), None
    writer = TrajectoryWriter(out) if out.exists() else None
    done = writer.n_committed if writer else 0
    for path, frame in _frames([Path(p) for p in paths], done, progress):
        if writer is None:
            writer = _create(out, frame, len(paths), options)
        if known is None:
            known = open_trajectory(out)
        _compare(path, frame, known)
        if writer.n_committed == writer.n_frames:
            writer = extend_trajectory(out, 2 * writer.n_frames)
        time = start + time_step * writer.n_committed
        writer.append(frame.density, time, positions=frame.positions)
    return out


def split_in_time(
    path: PathLike, fractions: Sequence[float] = (0.7, 0.1, 0.2), gap: float = 0.0
) -> dict[str, dict[str, Any]]:
    """Cut a run into train, validation and test, one after another, and write the splits.

    Parameters
    ----------
    path
        A store that is one run.
    fractions
        Of the run, for the three; they sum to at most one.
    gap
        Time left out between them, fs: longer than the density remembers, for a fair test. A
        second, independent run makes a better one.

    Raises
    ------
    TrajectoryError
        Impossible fractions, or a run too short for them.
    """
    with open_trajectory(path) as run:
        times = run["time"].values
    spacing = float(times[1] - times[0]) if len(times) > 1 else np.inf
    skip = int(np.ceil(gap / spacing - 1e-9))
    ends = np.round(np.cumsum(fractions) * len(times) + 1e-9).astype(int)
    starts = [0, *(ends[:-1] + skip)]
    if len(ends) != 3 or min(fractions) <= 0 or ends[-1] > len(times) or (ends <= starts).any():
        raise TrajectoryError(
            f"{path}: {len(times)} frames cannot be cut into {list(fractions)} with gaps of "
            f"{gap:g} fs; give three fractions, or a longer run"
        )
    splits = {
        name: {"run": ".", "start": int(first), "stop": int(last)}
        for name, first, last in zip(("train", "validation", "test"), starts, ends, strict=True)
    }
    write_splits(path, splits)
    return splits


def write_cube(run: xr.Dataset, frame: int, path: PathLike) -> None:
    """Write one frame as a cube file, which VESTA, ChimeraX, VMD and others draw.

    Parameters
    ----------
    run
        Trajectory with nuclei, open or in memory.
    frame
        Its index; negative ones count from the end.
    path
        The file; it appears only when complete.

    Raises
    ------
    TrajectoryError
        No such frame, no nuclei, or not three-dimensional.
    """
    if "positions" not in run or run["density"].ndim != 4:
        raise TrajectoryError(f"{path}: a cube file needs nuclei and three dimensions; give a run")
    if not -run.sizes["time"] <= frame < run.sizes["time"]:
        raise TrajectoryError(
            f"{path}: no frame {frame}; choose from 0 to {run.sizes['time'] - 1}"
        )
    ase, bohr = _ase()
    one = run.isel(time=frame)
    atoms = ase.Atoms(run["numbers"].values, one["positions"].values, cell=run["cell"].values)
    part = Path(path).with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        from ase.io.cube import write_cube as write

        comment = f"density in bohr**-3, t = {float(one['time']):g} fs"
        write(file, atoms, one["density"].values.astype(float) * bohr**3, comment=comment)
    part.replace(path)


def _kind(path: Path) -> str:
    if path.suffix.lower() in _CUBE:
        return "cube"
    if any(word in path.name.upper() for word in _VASP):
        return "CHGCAR"
    raise TrajectoryError(
        f"{path}: neither a cube file nor one of VASP by its name; rename it to end with .cube, "
        "or to begin with CHGCAR"
    )


def _ase() -> tuple[Any, float]:
    """ASE, and its bohr in angstrom."""
    try:
        import ase
        from ase.units import Bohr
    except ImportError as error:
        raise DensityKitError("cube and CHGCAR files need ASE; give: pip install ase") from error
    return ase, Bohr


def _read_cube(path: Path) -> list[Frame]:
    _, bohr = _ase()
    from ase.io.cube import read_cube

    with path.open(encoding="utf-8") as file:
        found = read_cube(file)
    atoms = found["atoms"]
    positions = atoms.positions - found["origin"]
    return [Frame(found["data"] / bohr**3, np.array(atoms.cell), atoms.numbers, positions)]


def _read_vasp(path: Path) -> list[Frame]:
    _ase()
    from ase.calculators.vasp import VaspChargeDensity

    found = VaspChargeDensity(path)
    both = zip(found.chg, found.atoms, strict=True)
    return [Frame(rho, np.array(a.cell), a.numbers, a.positions) for rho, a in both]


def _frames(paths: list[Path], done: int, progress: bool) -> Iterator[tuple[Path, Frame]]:
    """Frames that come after the first `done`; cube files, of one frame each, are not read."""
    while done and paths and _kind(paths[0]) == "cube":
        done, paths = done - 1, paths[1:]
    bar = tqdm(paths, "converting", unit="file", disable=not progress)
    yield from islice(((path, frame) for path in bar for frame in read_frames(path)), done, None)


def _create(out: Path, frame: Frame, n_frames: int, options: dict[str, Any]) -> TrajectoryWriter:
    numbers, grid = frame.numbers, frame.density.shape
    return create_trajectory(
        out, n_frames=n_frames, grid=grid, cell=frame.cell, numbers=numbers, **options
    )


def _compare(path: Path, frame: Frame, run: xr.Dataset) -> None:
    """Complain about a frame that is not of this run."""
    same = {
        "grid": frame.density.shape == run["density"].shape[1:],
        "cell": np.allclose(frame.cell, run["cell"].values, atol=1e-4),
        "atoms": np.array_equal(frame.numbers, run["numbers"].values),
    }
    wrong = ", ".join(name for name, equal in same.items() if not equal)
    if wrong:
        problem = f"{wrong} differ from those of {run.encoding['source']}"
        raise TrajectoryError(f"{path}: {problem}; give files of one run, in one trajectory")
