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
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from tqdm.auto import tqdm

from densitykit.errors import DensityKitError, TrajectoryError
from densitykit.io.reader import open_trajectory
from densitykit.io.rebuild import extend_trajectory
from densitykit.io.store import PathLike, fault, recover
from densitykit.io.writer import TrajectoryWriter, create_trajectory

__all__ = ["Frame", "convert", "read_frames", "write_cube"]

_CUBE, _VASP = (".cube", ".cub"), ("CHG", "AECCAR", "PARCHG")
_PACKED = (".gz", ".bz2", ".xz", ".zip")


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
    except OSError as error:
        raise TrajectoryError(f"{path}: {error.strerror or error}; correct the path") from error
    except Exception as error:  # the parsers of ASE raise many kinds
        fix = "write it again, with one field, in bohr, and numbers such as 1.0E-03"
        fix = fix if kind == "cube" else "write it again, as VASP 5 and later do"
        raise TrajectoryError(f"{path}: not a readable {kind} file ({error}); {fix}") from error
    if not frames or not all(np.isfinite(part).all() for frame in frames for part in frame):
        problem = "no density, a header that is not understood, or values that are not finite"
        raise TrajectoryError(f"{path}: {problem}; write the file again")
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

    To continue, or to add files that came later, give all files again, the old ones first.

    Parameters
    ----------
    paths
        See `read_frames`. A file may hold several frames.
    out
        The trajectory. One without committed frames is made anew.
    time_step
        Time between frames, fs.
    start
        Time of the first frame, fs.
    progress
        Show a progress bar over the files.
    **options
        Of `create_trajectory`: `quantity`, `keepbits`, `allow_negative`, `overwrite`, ...

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    TrajectoryError
        No files, one that cannot be read, one with another cell, grid or atoms, or `out` was
        made of other files or with other options.
    """
    paths = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not paths or not 0 < time_step < np.inf:
        raise TrajectoryError(f"{len(paths)} files, {time_step} fs apart; give some, and a time")
    out, known = Path(out), None
    writer = _continued(out, options)
    done = writer.n_committed if writer else 0
    for index, path, frame in _frames(paths, done, progress):
        if writer is None:
            writer = _create(out, frame, len(paths), options)
        if known is None:
            known = open_trajectory(out)
        time = start + time_step * index
        _compare(path, frame, known)
        if index < done:
            _compare_again(path, frame, time, known, index)
            continue
        if writer.n_committed == writer.n_frames:
            writer = extend_trajectory(out, 2 * writer.n_frames)
        try:
            writer.append(frame.density, time, positions=frame.positions)
        except TrajectoryError as error:
            raise TrajectoryError(f"{path}, for {error}") from error
    return out


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
        No such frame, no nuclei, values that are not finite, not three-dimensional, or a path
        that cannot be written.
    """
    needed = {"density", "positions", "numbers", "cell"}
    if not needed <= set(run.variables) or run["density"].ndim != 4:
        raise TrajectoryError(f"{path}: a cube file needs nuclei and three dimensions; give a run")
    if not -run.sizes["time"] <= frame < run.sizes["time"]:
        raise TrajectoryError(
            f"{path}: no frame {frame}; choose from 0 to {run.sizes['time'] - 1}"
        )
    ase, bohr = _ase()
    one = run.isel(time=frame)
    atoms = ase.Atoms(run["numbers"].values, one["positions"].values, cell=run["cell"].values)
    rho = one["density"].values.astype(float) * bohr**3
    if not (np.isfinite(rho).all() and np.isfinite(atoms.positions).all()):
        problem = f"density or positions of frame {frame} are not finite"
        raise TrajectoryError(f"{path}: {problem}; choose another frame")
    part = Path(path).with_suffix(".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            from ase.io.cube import write_cube as write

            write(file, atoms, rho, comment=f"density in bohr**-3, t = {float(one['time']):g} fs")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        problem = error.strerror or error
        raise TrajectoryError(f"{path}: {problem}; choose another path") from error


def _kind(path: Path) -> str:
    if path.suffix.lower() in _PACKED:
        raise TrajectoryError(f"{path}: compressed; unpack it, and give the file that comes out")
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

    with path.open(encoding="utf-8", errors="replace") as file:  # titles are in any encoding
        head = [file.readline() for _ in range(6)]
        if "OUTER LOOP" in head[1].upper():
            head[1] = ""  # by it ASE turns the field, but not the cell; the header's order counts
        if any(line.lstrip().startswith("-") for line in head[3:]):
            problem = "negative numbers of grid points, which mean lengths in angstrom"
            raise TrajectoryError(f"{path}: {problem}; write it again in bohr")
        lines = chain(head, file)
        found = read_cube(SimpleNamespace(readline=lambda: next(lines, ""), read=file.read))
    atoms = found["atoms"]
    positions = atoms.positions - found["origin"]
    return [Frame(found["data"] / bohr**3, np.array(atoms.cell), atoms.numbers, positions)]


def _read_vasp(path: Path) -> list[Frame]:
    _ase()
    from ase.calculators.vasp import VaspChargeDensity

    line, headers = b"", 0
    with path.open("rb") as file:
        for line in file:
            headers += line.strip().lower() == b"direct"
    if not line.endswith(b"\n"):  # ASE stops at half a header, and takes half a number
        problem = "empty or cut short: there is no newline at its end"
        raise TrajectoryError(f"{path}: {problem}; write it again, or add one if it is whole")
    found = VaspChargeDensity(path)
    if found.chg and headers > len(found.chg):  # it takes all after augmentation for such
        problem = f"{headers} frames, of which ASE can read {len(found.chg)}"
        raise TrajectoryError(f"{path}: {problem}; write it again, each CHGCAR by itself")
    both = zip(found.chg, found.atoms, strict=True)
    return [Frame(rho, np.array(a.cell), a.numbers, a.positions) for rho, a in both]


def _frames(paths: list[Path], done: int, progress: bool) -> Iterator[tuple[int, Path, Frame]]:
    """Frames and their indices; of cube files, one frame each, only the last done is read."""
    first = 0
    while first < min(done, len(paths)) - 1 and _kind(paths[first]) == "cube":
        first += 1
    bar = tqdm(paths[first:], "converting", unit="file", disable=not progress)
    both = ((path, frame) for path in bar for frame in read_frames(path))
    yield from ((index, path, frame) for index, (path, frame) in enumerate(both, first))


def _continued(out: Path, options: dict[str, Any]) -> TrajectoryWriter | None:
    """The writer of a store that has frames; None where one is to be made."""
    recover(out)  # a kill may have left it under another name
    if not out.exists() or options.get("overwrite"):
        return None
    writer = TrajectoryWriter(out)
    if not writer.n_committed:  # nothing to lose, and options that refused a frame may be new
        return None
    kept = open_trajectory(out)["density"].attrs
    for name in ("quantity", "keepbits", "resolution", "allow_negative"):
        if options.get(name) and options[name] != kept.get(name):
            problem = f"was made with {name}={kept.get(name)}, not {options[name]}"
            fix = "give another path, or overwrite=True to begin anew"
            raise fault(out, "density", problem, fix)
    return writer


def _create(out: Path, frame: Frame, n_frames: int, options: dict[str, Any]) -> TrajectoryWriter:
    given = {"grid": frame.density.shape, "cell": frame.cell, "numbers": frame.numbers}
    return create_trajectory(out, n_frames=n_frames, **given, **options | {"overwrite": True})


def _compare(path: Path, frame: Frame, run: xr.Dataset) -> None:
    """Complain about a frame that is not of this run."""
    cell = run["cell"].values
    same = {
        "grid": frame.density.shape == run["density"].shape[1:],
        "cell": cell.shape == (3, 3) and np.allclose(frame.cell, cell, atol=1e-4),
        "atoms": "numbers" in run and np.array_equal(frame.numbers, run["numbers"].values),
    }
    if wrong := _differing(same):
        problem = f"{wrong} differ from those of {run.encoding['source']}"
        raise TrajectoryError(f"{path}: {problem}; give files of one run, in one trajectory")


def _compare_again(path: Path, frame: Frame, time: float, run: xr.Dataset, index: int) -> None:
    """Complain about a frame that is not the committed one whose place it has."""
    kept, attrs = run.isel(time=index), run["density"].attrs
    rounded = {"rtol": 2.0 ** -attrs.get("keepbits", 23), "atol": attrs.get("resolution", 1e-30)}
    same = {
        "time": np.isclose(time, kept["time"].values, rtol=0, atol=1e-6),
        "positions": np.allclose(frame.positions, kept["positions"].values, rtol=0, atol=1e-6),
        "density": np.allclose(frame.density, kept["density"].values, **rounded),
    }
    if wrong := _differing(same):
        problem = f"unlike frame {index} of {run.encoding['source']} in {wrong}"
        fix = "give all files of before, in that order and with those times, then the new ones"
        raise TrajectoryError(f"{path}: {problem}; {fix}; or give another path")


def _differing(same: dict[str, bool]) -> str:
    """Names of what is not the same."""
    return ", ".join(name for name, equal in same.items() if not equal)
