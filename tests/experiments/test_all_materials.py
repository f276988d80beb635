"""The table of all materials: films judged by snapshots, and its text."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from experiments.all_materials import KEYS, markdown, static_scores, wanted


def snapshots(count: int, seed: int, amplitude: float = 0.2) -> xr.Dataset:
    """Random densities of a dozen waves in a cell of 6 angstrom, angstrom**-3."""
    rng, x = np.random.default_rng(seed), np.arange(12) / 12
    k = rng.integers(-2, 3, (count, 12, 3))
    phase = np.einsum("fwc,cxyz->fwxyz", k, np.stack(np.meshgrid(x, x, x, indexing="ij")))
    shift = rng.random((count, 12))[..., None, None, None]
    rho = np.exp(amplitude * np.cos(2 * np.pi * (phase + shift)).sum(axis=1))
    return xr.Dataset(
        {
            "density": (("time", "x", "y", "z"), rho),
            "cell": (("vector", "cartesian"), 6.0 * np.eye(3)),
        }
    )


def test_other_snapshots_of_the_same_kind_pass() -> None:
    training, test = snapshots(20, 1), snapshots(12, 2)
    scores = static_scores(snapshots(12, 3)["density"].values, test, training)
    assert scores["value-sJSD over its noise level"] < 5
    assert scores["S(q) of the density, shells inside"] > 0.8


def test_densities_of_another_kind_fail() -> None:
    training, test = snapshots(20, 1), snapshots(12, 2)
    scores = static_scores(snapshots(12, 3, amplitude=0.4)["density"].values, test, training)
    assert scores["value-sJSD over its noise level"] > 20
    assert scores["S(q) of the density, shells inside"] < 0.5


def test_a_cell_of_the_table_has_mean_and_error() -> None:
    rows = pd.DataFrame(
        {
            "material": "water, 300 K",
            "emulator": "map",
            "metric": ["one-step l1", "one-step l1", "speed-up"],
            "value": [0.003, 0.005, 1234.0],
        }
    )
    line = markdown(rows).splitlines()[-1]
    assert "| 0.4 +- 0.1 |" in line
    assert "| 1234 |" in line


def test_the_table_has_a_line_for_each_emulator() -> None:
    """The bundled file holds what the script would compute."""
    rows = pd.read_csv("data/materials/all.csv")
    assert set(rows[KEYS].itertuples(index=False, name=None)) == set(wanted((0, 1, 2)))
