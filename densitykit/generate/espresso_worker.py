"""The process that holds Quantum ESPRESSO: started by :mod:`densitykit.generate.espresso`.

Run by a Python of its own, because the `qepy` wheel needs old versions of numpy and scipy and
keeps its state in Fortran globals: one cell and one set of atoms for the life of a process. This
file imports nothing of densitykit. It talks over two pipes in records of eight bytes of length and
one `npz` archive of plain arrays (never pickles), so that nothing it receives can execute code.
Standard output belongs to Quantum ESPRESSO.

Usage: ``python espresso_worker.py REQUESTS REPLIES`` (file descriptors), in a scratch folder that
holds `pw.in`.
"""

from __future__ import annotations

import ctypes
import glob
import io
import os
import signal
import struct
import sys
import sysconfig
from typing import Any, BinaryIO

import numpy as np

PR_SET_PDEATHSIG = 1


def write_record(stream: BinaryIO, **arrays: Any) -> None:
    """Send named arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    stream.write(struct.pack("<q", buffer.tell()) + buffer.getvalue())
    stream.flush()


def read_record(stream: BinaryIO) -> dict[str, np.ndarray]:
    """Receive named arrays; EOFError when the other side is gone."""
    size = struct.unpack("<q", _exactly(stream, 8))[0]
    with np.load(io.BytesIO(_exactly(stream, size)), allow_pickle=False) as record:
        return dict(record)


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError("the other side closed the pipe")
    return data


def load_openblas() -> str:
    """Put the OpenBLAS inside the scipy wheel before the reference BLAS inside qepy's.

    Symbols are bound to the first library loaded: with the same energies a step takes half the
    time. scipy up to 1.11 carries an OpenBLAS with plain names, which needs its own libgfortran.
    """
    folder = sysconfig.get_paths()["purelib"] + "/scipy.libs"
    found = ""
    for pattern in ("libquadmath*", "libgfortran*", "libopenblas*"):
        for library in sorted(glob.glob(f"{folder}/{pattern}")):
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
            found = os.path.basename(library)
    return found if "openblas" in found else "reference BLAS"


def die_with_parent() -> None:
    """Have the kernel end this process with its parent, where the kernel can (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests until the pipe is closed."""
    blas = load_openblas()
    import qepy
    from qepy.driver import Driver

    driver = Driver("pw.in")
    versions = {"qepy": qepy.__version__, "blas": blas, "numpy": np.__version__}
    write_record(replies, **versions, grid=np.array(driver.get_number_of_grid_points()))
    while True:
        request = read_record(requests)
        if "positions" in request:
            write_record(replies, **solve(driver, **request))
        else:
            write_record(replies, density=density(driver))


def solve(
    driver: Any,
    positions: np.ndarray,
    start: np.ndarray | None = None,
    limit: np.ndarray | None = None,
) -> dict[str, Any]:
    """Solve the Kohn-Sham equations for these positions (bohr); energies in Ry, forces Ry/bohr.

    `start` is a density on the grid of Quantum ESPRESSO, bohr**-3, to start from; `limit` the
    number of iterations after which self-consistency is given up.
    """
    if getattr(driver, "started", False):
        driver.update_ions(positions)
    driver.started = True
    if start is not None:
        driver.set_density(start.reshape(-1, 1, order="F"))
        driver.qepy_pw.qepy_mod.qepy_calc_effective_potential()
    if limit is not None:
        driver.qepy_modules.control_flags.set_niter(int(limit))
    driver.scf()
    flags = driver.qepy_modules.control_flags
    return {
        "energy": driver.get_energy(),
        "forces": np.array(driver.get_forces()),
        "iterations": driver.get_scf_steps(),
        "converged": bool(flags.get_conv_elec()),
        "error": driver.get_scf_error(),
    }


def density(driver: Any) -> np.ndarray:
    """Return the valence density on the grid of Quantum ESPRESSO, bohr**-3."""
    values = np.asarray(driver.get_density())
    shape = tuple(int(n) for n in driver.get_number_of_grid_points())
    return np.ascontiguousarray(values.sum(axis=1).reshape(shape, order="F"))


def main() -> None:
    die_with_parent()
    requests, replies = os.fdopen(int(sys.argv[1]), "rb"), os.fdopen(int(sys.argv[2]), "wb")
    try:
        serve(requests, replies)
    except (EOFError, BrokenPipeError):  # the parent is done with us
        os._exit(0)


if __name__ == "__main__":
    main()
