"""The examination of emulators: its rows, and that nothing is computed twice."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from densitykit.io.reader import open_split
from experiments import long_rollouts as long_rollouts

DATA = Path(__file__).parents[2] / "data"
STORE = DATA / "lithium-800K.zarr"
UNET = DATA / "checkpoints" / "lithium-unet.safetensors"


@pytest.fixture(scope="module")
def quick():
    """Rollouts of 25 steps, ensembles of 2 steps, one-step errors of few pairs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_rollouts, "TEN_PS", 300.0)
        patch.setattr(long_rollouts, "ENSEMBLE", {"steps": 2, "members": 2, "starts": 1})
        table = long_rollouts.one_step_table
        patch.setattr(
            long_rollouts, "one_step_table", lambda maps, test: table(maps, test, every=150)
        )
        yield


@pytest.fixture(scope="module")
def studied(quick, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    options = {"seeds": [0], "parts": long_rollouts.PARTS[:5], "run_dir": folder / "runs"}
    rows = long_rollouts.run_long_rollouts([UNET], STORE, folder / "rows.csv", **options)
    return folder, options, rows


def test_rows_are_tidy_and_whole(studied):
    folder, _, rows = studied
    assert list(rows.columns) == long_rollouts.COLUMNS
    # a U-Net has no temperature that could be matched
    assert set(rows.part) == {"one step", "ensemble", "10 ps"}
    assert set(rows.model) == {"lithium-unet"}
    judged = rows[rows.part == "10 ps"].set_index("metric")
    assert len(judged) == 10 and judged.value["frames with all nuclei"] > 0.9
    assert rows[rows.part == "one step"].value.between(0.001, 0.02).all()
    pd.testing.assert_frame_equal(pd.read_csv(folder / "rows.csv"), rows)


def test_what_is_there_is_not_computed_again(studied, monkeypatch):
    folder, options, rows = studied

    def fail(*arguments, **options):
        raise AssertionError("computed again")

    monkeypatch.setattr(long_rollouts, "load_windows", fail)
    again = long_rollouts.run_long_rollouts([UNET], STORE, folder / "rows.csv", **options)
    assert len(again) == len(rows)
    with pytest.raises(AssertionError, match="computed again"):
        long_rollouts.run_long_rollouts(
            [UNET], STORE, folder / "rows.csv", **options | {"seeds": [0, 1]}
        )


def test_a_matched_rollout_has_the_temperature_of_the_test_run(quick, tmp_path, monkeypatch):
    """With half of the forces, in single precision, where it is to be fast."""
    seen = []

    kelvin = float(open_split(STORE, "test").temperature.mean())

    def judged(step, *_):
        seen.append(
            (step.temperature == kelvin, step.substeps, step.force_field.coefficients.dtype)
        )
        return pd.DataFrame({"metric": ["m"], "value": [1.0]})

    monkeypatch.setattr(long_rollouts, "_judged", judged)
    nuclear = UNET.with_name("lithium-nuclear.safetensors")
    parts = ["10 ps", "10 ps, matched", "10 ps, matched, fast"]
    long_rollouts.run_long_rollouts(
        [nuclear], STORE, tmp_path / "rows.csv", seeds=[0], parts=parts
    )
    two, one = (2, torch.float64), (1, torch.float32)
    assert seen == [(False, *two), (True, *two), (True, *one)]
