"""Ablations of the motion of nuclei, on short stretches of the bundled run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from densitykit.errors import CheckpointError
from densitykit.io.reader import open_runs
from experiments import motion_ablations as ablations

DATA = Path(__file__).parents[2] / "data"
STORE, VOLUMES = DATA / "lithium-800K.zarr", DATA / "lithium-volumes.zarr"
NUCLEAR = DATA / "checkpoints" / "lithium-nuclear"
SOME = [
    "as bundled",
    "degree 0: distances only",
    "one volume",
    "one force a step",
    "no thermostat",
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, Path]:
    """Rollouts of 40 steps, force fields from 20 frames."""
    out = tmp_path_factory.mktemp("motion") / "rows.csv"
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        options = {"seeds": [0], "variants": SOME, "volumes": open_runs(VOLUMES)[::2]}
        return ablations.run_motion_ablations(STORE, NUCLEAR, out, **options), out


def shorten(patch: pytest.MonkeyPatch) -> None:
    whole = ablations.open_split
    patch.setattr(ablations, "open_split", lambda *a: whole(*a).isel(time=slice(160)))
    patch.setattr(ablations, "LENGTH", 480.0)
    patch.setattr(ablations, "SETTLED", 60.0)
    patch.setattr(ablations, "FIT", (60.0, 120.0))


@pytest.mark.slow
def test_each_variant_has_its_rows(rows: tuple[pd.DataFrame, Path]) -> None:
    table = rows[0].pivot_table("value", "variant", "metric")
    assert set(table.index) == set(SOME) and np.isfinite(table.values).all()
    force = table["rms force error, meV/angstrom"]
    # 20 frames are enough to tell angles from distances; the forces do not know of time steps
    assert force["as bundled"] < 0.8 * force["degree 0: distances only"]
    assert force["as bundled"] == force["one force a step"] == force["no thermostat"] < 25
    pressure = table["pressure, GPa"]  # that of the data is -0.5
    assert abs(pressure["as bundled"] + 0.5) < 0.4 and pressure["one volume"] < -3
    for lead in (60, 144, 300):
        path = table[f"path error after {lead} fs, angstrom"]
        assert path["as bundled"] == path["no thermostat"]  # paths are without random numbers
        assert path["as bundled"] != path["one force a step"]
    early, late = (table[f"path error after {lead} fs, angstrom"] for lead in (60, 300))
    assert (early < late).all() and early["as bundled"] < 0.05
    assert table["temperature, K"].between(400, 1200).all()
    assert table["temperature, K"].nunique() == len(SOME)


@pytest.mark.slow
def test_nothing_is_computed_twice(
    rows: tuple[pd.DataFrame, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    table, out = rows

    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("fitted again")

    monkeypatch.setattr(ablations, "fit_force_field", fail)
    again = ablations.run_motion_ablations(STORE, NUCLEAR, out, seeds=[0], variants=SOME)
    pd.testing.assert_frame_equal(again, table)
    with pytest.raises(AssertionError, match="fitted again"):
        ablations.run_motion_ablations(STORE, NUCLEAR, out, seeds=[1], variants=SOME)


def test_other_models_have_no_nuclei(tmp_path: Path) -> None:
    unet = NUCLEAR.with_name("lithium-unet")
    with pytest.raises(CheckpointError, match="a SurrogateUNet; give an emulator with nuclei"):
        ablations.run_motion_ablations(STORE, unet, tmp_path / "rows.csv", variants=SOME)


def test_variants_change_one_thing_each() -> None:
    base = ablations.MOTIONS["as bundled"]
    for name, motion in ablations.MOTIONS.items():
        changed = sum(a != b for a, b in zip(motion, base, strict=True))
        assert changed == (name != "as bundled")
