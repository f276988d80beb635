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

__all__ = ["DensityFiles"]


class DensityFiles(BackendEntrypoint):
    """The frames of a cube, CHGCAR or XSF file, variables as in a trajectory without times."""

    description = "Electron densities: cube, CHGCAR, XSF"

    def open_dataset(
        self,
        filename_or_obj: Any,
        *,
        drop_variables: str | Iterable[str] | None = None,
        reading: Reading | None = None,
    ) -> xr.Dataset:
        """Read a file; see `densitykit.io.formats.iter_frames`."""
        frames = read_frames(filename_or_obj, reading)
        names = ["density", "positions", "cell"]
        names += ["magnetization"] if frames[0].magnetization is not None else []
        values = {name: np.stack([getattr(frame, name) for frame in frames]) for name in names}
        if np.allclose(values["cell"], values["cell"][0]):
            values["cell"] = values["cell"][0]
        values["numbers"] = frames[0].numbers
        ds = xr.Dataset()
        for name, array in values.items():
            dims, unit, text = schema_for(3)[name]
            dims = dims if array.ndim == len(dims) else ("time", *dims)
            ds[name] = (dims, array, {"units": unit, "long_name": text})
        return ds.drop_vars(drop_variables or [], errors="ignore")

    def guess_can_open(self, filename_or_obj: Any) -> bool:
        """Whether the name is that of a density file."""
        if not isinstance(filename_or_obj, str | os.PathLike):
            return False
        try:
            return bool(format_of(Path(filename_or_obj)))
        except TrajectoryError:
            return False
