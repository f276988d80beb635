"""xarray opens density files by their names: `xr.open_dataset("CHGCAR")`, `("run.cube")`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendEntrypoint

from densitykit.errors import TrajectoryError
from densitykit.io.formats import Reading, format_of, read_frames
from densitykit.io.schema import schema_for
from densitykit.io.store import plain_attributes

__all__ = ["DensityFiles"]


class DensityFiles(BackendEntrypoint):
    """The frames of a cube, CHGCAR or XSF file, variables as in a trajectory without times."""

    description = "Electron densities: cube, CHGCAR, XSF"
    open_dataset_parameters = ("filename_or_obj", "drop_variables", "reading")

    def open_dataset(
        self,
        filename_or_obj: Any,
        *,
        drop_variables: str | Iterable[str] | None = None,
        reading: Reading | None = None,
    ) -> xr.Dataset:
        """Read a file; see `densitykit.io.formats.iter_frames`."""
        frames, schema = read_frames(filename_or_obj, reading), schema_for(3)
        values = {n: np.stack([getattr(f, n) for f in frames]) for n in ("density", "positions")}
        if all(frame.magnetization is not None for frame in frames):
            values["magnetization"] = np.stack([frame.magnetization for frame in frames])
        cells = np.stack([frame.cell for frame in frames])
        values |= {"numbers": frames[0].numbers, "cell": cells}
        dims = {name: schema[name].dims for name in values}
        if np.allclose(cells, cells[0]):
            values["cell"] = cells[0]
        else:
            dims["cell"] = ("time", *dims["cell"])
        ds = xr.Dataset({name: (dims[name], value) for name, value in values.items()})
        for name in values:
            unit, text = schema[name].units, schema[name].long_name
            ds[name].attrs = plain_attributes({"units": unit, "long_name": text})
        dropped = [drop_variables] if isinstance(drop_variables, str) else drop_variables or []
        return ds.drop_vars(dropped, errors="ignore")

    def guess_can_open(self, filename_or_obj: Any) -> bool:
        """Whether the name is that of a density file."""
        if (
            not isinstance(filename_or_obj, str | os.PathLike)
            or str(filename_or_obj)[-3:] == ".nc"
        ):
            return False
        try:
            return bool(format_of(Path(filename_or_obj)))
        except TrajectoryError:
            return False
