"""One frame of a trajectory as a file that other programs draw or read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr

from densitykit.errors import TrajectoryError
from densitykit.io.formats import Frame, format_of
from densitykit.io.formats.cube import write_cube
from densitykit.io.formats.text import PACKED
from densitykit.io.formats.vasp import write_vasp
from densitykit.io.formats.xsf import write_xsf
from densitykit.io.store import PathLike, fresh

__all__ = ["export_frame"]

_WRITERS = {"cube": write_cube, "CHGCAR": write_vasp, "xsf": write_xsf}


def export_frame(run: xr.Dataset, frame: int, path: PathLike) -> None:
    """Write one frame; atoms are wrapped into the cell.

    Parameters
    ----------
    run
        Trajectory with nuclei, open or in memory.
    frame
        Its index; negative ones count from the end.
    path
        The file, which appears only when complete; its name tells the format: `*.cube`,
        CHGCAR or `*.vasp`, `*.xsf`, or `*.zarr`, a store of one frame.

    Raises
    ------
    TrajectoryError
        No such frame, no nuclei, values that are not finite, not three-dimensional, or a path
        that cannot be written or whose name tells no format.
    """
    path = Path(path)
    if not -run.sizes["time"] <= frame < run.sizes["time"]:
        raise TrajectoryError(
            f"{path}: no frame {frame}; choose from 0 to {run.sizes['time'] - 1}"
        )
    if path.suffix.lower() == ".zarr":
        attrs = {name: value for name, value in run.attrs.items() if "split" not in name}
        one = run.isel(time=[frame]).drop_encoding()
        one.attrs = attrs
        try:
            one.to_zarr(path, mode="w-", zarr_format=3, consolidated=False)
        except OSError as error:
            raise TrajectoryError(f"{path}: {error}; choose another path") from error
        return
    if path.suffix.lower() in PACKED:
        raise TrajectoryError(f"{path}: packed; drop {path.suffix}, and pack it afterwards")
    write, part = _WRITERS[format_of(path)], fresh(path, "part")
    one = _frame(run, frame, path)
    title = f"densitykit: electron density, t = {float(run['time'][frame]):g} fs"
    try:
        with part.open("w", encoding="utf-8") as file:
            write(file, one, title)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        problem = error.strerror or error
        raise TrajectoryError(f"{path}: {problem}; choose another path") from error


def _frame(run: xr.Dataset, frame: int, path: Path) -> Frame:
    needed = {"density", "positions", "numbers", "cell"}
    if not needed <= set(run.variables) or run["density"].ndim != 4:
        problem = "such a file needs nuclei and three dimensions"
        raise TrajectoryError(f"{path}: {problem}; give a run that has them, or a name.zarr")
    one = run.isel(time=frame)
    cell, positions = one["cell"].values, one["positions"].values
    density = one["density"].values.astype(float)
    if not (np.isfinite(density).all() and np.isfinite(positions).all()):
        problem = f"density or positions of frame {frame} are not finite"
        raise TrajectoryError(f"{path}: {problem}; choose another frame")
    wrapped = positions @ np.linalg.inv(cell) % 1 @ cell
    spin = one["magnetization"].values.astype(float) if "magnetization" in one else None
    valence = one["valence_charge"].values if "valence_charge" in one else None
    return Frame(density, cell, one["numbers"].values, wrapped, spin, valence)
