"""The whole way from the shell, on runs that are neither lithium nor cubic nor 12 fs apart."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from analytic import HEXAGONAL, moving_atoms

from densitykit.assess import one_step_errors
from densitykit.cli import main
from densitykit.data.windows import load_windows
from densitykit.io.reader import open_trajectory
from densitykit.io.splits import write_splits
from densitykit.io.validate import validate_trajectory
from densitykit.io.writer import create_trajectory
from densitykit.models import load_model
from densitykit.models.baselines import Persistence

#: name -> atomic numbers, cell, grid, time between frames in fs, horizon in fs
RUNS = {
    "orthorhombic": ([11, 17] * 4, np.diag([5.0, 6.0, 7.0]), (8, 10, 12), 2.5, 5.0),
    "odd": ([3] * 4, 6 * np.eye(3), (14, 14, 14), 1.0, 5.0),
    "triclinic": (
        [1, 1, 8],
        HEXAGONAL + [[0, 0, 0], [0, 0, 0.5], [0.3, 0, 0]],
        (7, 9, 10),
        0.5,
        1,
    ),
}
BOUNDS = {"train": (0, 40), "validation": (40, 60), "test": (60, 170)}


def store(run: xr.Dataset, path: Path, positions: bool = True) -> Path:
    """Write a run in memory, with splits."""
    numbers = run.numbers.values if positions else None
    grid, cell = run.density.shape[1:], run.cell.values
    options = {"n_frames": run.sizes["time"], "grid": grid, "cell": cell, "numbers": numbers}
    names = ("positions", "velocities") if positions else ()
    with create_trajectory(path, **options) as writer:
        for i, time in enumerate(run.time.values):
            atoms = {name: run[name].values[i] for name in names}
            writer.append(run.density.values[i], float(time), **atoms)
    write_splits(path, {k: {"run": ".", "start": a, "stop": b} for k, (a, b) in BOUNDS.items()})
    return path


@pytest.fixture(params=["odd", "triclinic"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def data(kind: str, tmp_path: Path) -> Path:
    numbers, cell, grid, time_step, _ = RUNS[kind]
    options = {"cell": cell, "grid": grid, "time_step": time_step, "kelvin": 2000.0}
    return store(moving_atoms(numbers, frames=170, **options), tmp_path / "run.zarr")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """Give `command(*words) -> (exit code, stdout, stderr)`."""
    threads = torch.get_num_threads()

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["densitykit", *map(str, words)])
        code = main()
        return code, *capsys.readouterr()

    yield call
    torch.set_num_threads(threads)


def test_train_roll_out_and_evaluate(
    kind: str, data: Path, command: Callable, tmp_path: Path
) -> None:
    """A surrogate, its rollout, and both in one table beside the baselines."""
    numbers, cell, grid, time_step, horizon = RUNS[kind]
    assert validate_trajectory(data) == []
    model, film, out = (tmp_path / n for n in ("mine.safetensors", "film.zarr", "table.csv"))
    words = ["--horizon", horizon, "--steps", 2, "--batch", 1, "--run-dir", tmp_path / "state"]
    code, text, err = command("train", "surrogate", data, model, *words)
    assert code == 0, err
    resampled = any(n % 4 for n in grid)
    assert ("resampled to" in text) == resampled
    if kind == "odd":
        assert "(16, 16, 16)" in text
    trained = load_model(model)
    assert trained.horizon == horizon and trained.domain.time_step == time_step
    assert trained.domain.species == tuple(sorted(set(numbers)))

    code, text, err = command("rollout", model, data, film, "--steps", 24, "--frame", 3)
    assert code == 0 and f"every {horizon:g} fs" in text, err
    rolled, run = open_trajectory(film), open_trajectory(data)
    assert rolled.density.shape == (25, *grid) and validate_trajectory(film) == []
    np.testing.assert_allclose(rolled.cell, cell, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(rolled.density[0], run.density[60 + 2 + 3])
    np.testing.assert_allclose(rolled.time, run.time.values[65] + horizon * np.arange(25))
    np.testing.assert_allclose(rolled.n_electrons, rolled.n_electrons[0], rtol=1e-5)
    assert rolled.numbers.values.tolist() == numbers

    code, text, err = command("evaluate", data, model, "--rollouts", film, "--out", out)
    assert code == 0, err
    table = pd.read_csv(out)
    names = ["mine", "Fourier linear map", "POD + linear map", "persistence", "mean field"]
    assert {*names, "linear extrapolation", "film"} == set(table.model)
    steps = table[table.metric == "one-step l2"].set_index("model").value
    assert np.isfinite(steps).all() and (steps > 0).all()
    held_out = load_windows(data, "test", horizon)
    expected = one_step_errors(Persistence(horizon), held_out)[:, 1].mean()
    assert steps["persistence"] == pytest.approx(expected, rel=1e-6)
    judged = table[table.model == "film"].set_index("metric")
    assert judged.value["electron count, largest error"] < 1e-5


@pytest.mark.parametrize("kind", ["orthorhombic"], indirect=True)
def test_the_horizon_is_chosen_where_none_is_given(
    kind: str, data: Path, command: Callable, tmp_path: Path
) -> None:
    expected = load_windows(data, "train").horizon
    words = ["--steps", 1, "--batch", 1, "--run-dir", tmp_path / "state"]
    code, text, err = command("train", "surrogate", data, tmp_path / "m", *words)
    assert code == 0 and f"after {expected:g} fs" in text, err
    assert load_model(tmp_path / "m").horizon == expected
    assert (expected / 2.5) % 1 == 0


@pytest.mark.parametrize("kind", ["orthorhombic"], indirect=True)
def test_models_of_other_data_are_refused_in_a_line(
    kind: str, data: Path, command: Callable, tmp_path: Path
) -> None:
    """Another time step, another material, a horizon that the frames do not have."""
    words = ["--horizon", 5, "--steps", 1, "--batch", 1, "--run-dir", tmp_path / "state"]
    assert command("train", "surrogate", data, tmp_path / "m", *words)[0] == 0
    numbers, cell, grid, _, _ = RUNS[kind]
    options = {"cell": cell, "grid": grid, "frames": 170}
    for name, other, problem in (
        ("fine", moving_atoms(numbers, time_step=1.25, **options), "1.25 fs apart.*2.5 fs apart"),
        ("other", moving_atoms([3, 9] * 4, time_step=2.5, **options), r"\[3, 9\].*\[11, 17\]"),
        ("coarse", moving_atoms(numbers, time_step=4.0, **options), "5 fs.*4 fs between.* 4 or 8"),
    ):
        path = store(other, tmp_path / f"{name}.zarr")
        code, out, err = command("rollout", tmp_path / "m", path, tmp_path / "o.zarr")
        assert code == 2 and out == "" and err.count("\n") == 1
        assert re.search(problem, err), err
        assert not (tmp_path / "o.zarr").exists()


def test_densities_alone_suffice(command: Callable, tmp_path: Path) -> None:
    """No positions, no numbers: train, roll out and judge what the density tells."""
    numbers, cell, grid, time_step, horizon = RUNS["orthorhombic"]
    run = moving_atoms(numbers, 170, time_step, cell, grid, kelvin=2000.0)
    data = store(run, tmp_path / "bare.zarr", positions=False)
    words = ["--horizon", horizon, "--steps", 1, "--batch", 1, "--run-dir", tmp_path / "state"]
    assert command("train", "surrogate", data, tmp_path / "m", *words)[0] == 0
    film, out = tmp_path / "film.zarr", tmp_path / "t.csv"
    assert command("rollout", tmp_path / "m", data, film, "--steps", 24)[0] == 0
    code, _, err = command("evaluate", data, "--rollouts", film, "--out", out)
    assert code == 0, err
    metrics = pd.read_csv(out).metric
    assert metrics.str.startswith("S(q) of the density").any()
    assert not metrics.str.contains("nuclei|temperature|diffusion").any()
