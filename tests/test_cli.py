"""The command line: exit codes, messages that name file, variable and fix, each command once."""

from __future__ import annotations

import argparse
import errno
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from test_nuclear import liquid_run

from densitykit import __version__
from densitykit.cli import main, parser
from densitykit.data.windows import load_pairs
from densitykit.errors import TrajectoryError
from densitykit.io.reader import open_trajectory
from densitykit.io.splits import write_splits
from densitykit.io.writer import create_trajectory
from densitykit.models import SurrogateUNet, load_model, read_provenance, save_model
from densitykit.rollout import rollout

SPLITS = {
    "train": {"run": ".", "start": 0, "stop": 20},
    "validation": {"run": ".", "start": 22, "stop": 34},
    "test": {"run": ".", "start": 36, "stop": 48},
}


@pytest.fixture
def command(monkeypatch, capsys):
    """Give `command(*words) -> (exit code, stdout, stderr)`."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["densitykit", *map(str, words)])
        code = main()
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def store(mock_trajectory) -> Path:
    """Give a store with splits, frames 2 fs apart."""
    path = mock_trajectory("li.zarr", n_frames=48)
    write_splits(path, SPLITS)
    return path


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Give an untrained small surrogate."""
    torch.manual_seed(0)
    card = {"mu": -4.0, "sigma": 0.5, "eps": 0.01, "horizon": 12.0}
    card |= {"widths": [8, 16], "blocks": [1, 1], "patch": 2}
    return save_model(SurrogateUNet(**card), tmp_path / "tiny.safetensors", card)


def test_export_and_convert_are_inverse(command, store, tmp_path) -> None:
    cubes = [tmp_path / f"{frame}.cube" for frame in range(6)]
    for frame, path in enumerate(cubes):
        assert command("export", store, path, "--frame", frame)[:2] == (0, f"{path}\n")
    words = ["--time-step", 2.0, "--splits", 0.5, 0.25, 0.25, "--keepbits", 18]
    code, out, _ = command("convert", tmp_path / "back.zarr", *cubes, *words)
    assert code == 0 and "6 frames" in out
    back, run = open_trajectory(tmp_path / "back.zarr"), open_trajectory(store)
    np.testing.assert_allclose(back.density, run.density[:6], rtol=1e-5)
    assert set(json.loads(back.attrs["splits"])) == {"train", "validation", "test"}
    code, _, error = command("convert", tmp_path / "new.zarr", store, "--time-step", 1.0)
    assert code == 2 and "li.zarr" in error


# --- version and usage -----------------------------------------------------------------------


def test_version_of_the_module():
    root = Path(__file__).parents[1]
    words = [sys.executable, "-m", "densitykit", "--version"]
    found = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == __version__


@pytest.mark.parametrize("words", [[], ["nonsense"], ["validate"]])
def test_wrong_usage_is_an_error(words, command, capsys):
    with pytest.raises(SystemExit) as stop:
        command(*words)
    assert stop.value.code == 2 and "usage: densitykit" in capsys.readouterr().err


def commands(found: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Give the parsers of all commands and their commands, by name."""
    result = {found.prog: found}
    for action in found._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                result |= commands(sub)
    return result


def test_every_command_and_option_is_explained():
    for name, found in commands(parser()).items():
        assert found.description, name
        assert found.format_help().startswith(f"usage: {name}")
        for action in found._actions:
            named = isinstance(action, argparse._SubParsersAction) or action.help
            assert named, f"{name} {action.dest}"


def test_help_needs_no_library():
    heavy = {"numpy", "pandas", "torch", "xarray", "zarr"}
    code = "import sys; from densitykit.cli import parser; parser().format_help(); "
    code += f"print(sorted({heavy} & set(sys.modules)))"
    words = [sys.executable, "-c", code]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("train latent a b --steps 0", "--steps: 0 is not in 1.."),
        ("train latent a b --batch -1", "--batch: -1 is not in 1.."),
        ("train latent a b --rate nan", "--rate: nan is not a positive number"),
        ("train latent a b --rate inf", "--rate: inf is not a positive number"),
        ("train latent a b --rate fast", "--rate: 'fast' is no number"),
        ("train latent a b --lambda-2 -1", "--lambda-2: -1 is not a number from zero on"),
        (f"train latent a b --seed {2**64}", f"--seed: {2**64} is not in 0..4294967295"),
        ("train latent a b --seed -1", "--seed: -1 is not in 0.."),
        ("train latent a b --threads 1.5", "--threads: '1.5' is no whole number"),
        ("rollout a b c --frame -1", "--frame: -1 is not in 0.."),
        ("rollout a b c --thermostat 0", "--thermostat: 0 is not a positive number"),
        ("convert a b --time-step 0", "--time-step: 0 is not a positive number"),
        ("convert a b --time-step 1 --keepbits 24", "--keepbits: 24 is not in 1..23"),
        ("convert a b --time-step 1 --gap -2", "--gap: -2 is not a number from zero on"),
        ("generate chain a --interval 0", "--interval: 0 is not in 1.."),
        ("generate water a --workers 0", "--workers: 0 is not in 1.."),
    ],
)
def test_values_out_of_range_are_usage_errors(words, complaint, command, capsys):
    with pytest.raises(SystemExit) as stop:
        command(*words.split())
    assert stop.value.code == 2
    assert f"error: argument {complaint}" in capsys.readouterr().err


def test_errors_of_the_system_name_the_file(command, monkeypatch):
    def full(path: Path) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("densitykit.io.reader.summarise", full)
    expected = (2, "", "densitykit: big.zarr: No space left on device\n")
    assert command("describe", "big.zarr") == expected


def test_the_console_command_is_declared():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"densitykit": "densitykit.cli:main"}


# --- validate --------------------------------------------------------------------------------


def test_a_good_store_is_valid(command, mock_trajectory):
    path = mock_trajectory()
    assert command("validate", path) == (0, f"{path}: valid\n", "")


def no_store(path: Path) -> None:
    (path / "zarr.json").unlink()


def no_cell(path: Path) -> None:
    shutil.rmtree(path / "cell")


def wrong_shape(path: Path) -> None:
    zarr.open_group(path, mode="r+")["time"].resize((5,))


def poison(value: float):
    def act(path: Path) -> None:
        density = zarr.open_group(path, mode="r+")["density"]
        frame = density[3]
        frame[1, 2, 3] = value
        density[3] = frame

    return act


@pytest.mark.parametrize(
    ("spoil", "variable", "fix"),
    [
        (no_store, "store", "create_trajectory"),
        (no_cell, "cell", "missing"),
        (wrong_shape, "time", ";"),
        (poison(np.nan), "density, frame 3: values are not finite", "recompute"),
        (poison(-0.1), "density, frame 3: 1 negative", "recompute or clip"),
    ],
)
def test_a_bad_store_is_described(spoil, variable, fix, command, mock_trajectory):
    path = mock_trajectory("bad.zarr")
    spoil(path)
    code, out, _ = command("validate", path)
    assert code == 1 and "bad.zarr" in out and variable in out and fix in out
    assert "problem(s)" in out and ": valid" not in out


def test_a_missing_store_is_described(command, tmp_path):
    code, out, _ = command("validate", tmp_path / "none.zarr")
    assert code == 1 and "none.zarr" in out and "does not exist" in out


# --- data that models cannot take ------------------------------------------------------------


def with_cell(cell: np.ndarray):
    def act(path: Path) -> None:
        zarr.open_group(path, mode="r+")["cell"][:] = cell

    return act


@pytest.mark.parametrize(
    ("spoil", "options", "variable", "fix"),
    [
        (with_cell(np.diag([6.0, 6.0, 7.0])), {}, "cell", "cubic cell"),
        (with_cell(6 * np.eye(3)[[1, 2, 0]]), {}, "cell", "aligned with the axes"),
        (None, {"grid": (7, 7, 7)}, "density", "densitykit.fields.resample"),
        (None, {"grid": (8, 8, 6)}, "density", "densitykit.fields.resample"),
        (poison(-0.1), {}, "density", "densitykit validate"),
        (poison(np.nan), {}, "density", "densitykit validate"),
    ],
)
def test_load_pairs_names_file_variable_and_fix(spoil, options, variable, fix, mock_trajectory):
    path = mock_trajectory("bad.zarr", **options)
    write_splits(path, {"train": {"run": ".", "start": 0, "stop": 8}})
    if spoil:
        spoil(path)
    with pytest.raises(TrajectoryError) as error:
        load_pairs(path, "train", 2.0)
    for word in ("bad.zarr", f"variable '{variable}'", fix):
        assert word in str(error.value)


# --- the commands ----------------------------------------------------------------------------


def test_describe(command, mock_trajectory):
    code, out, _ = command("describe", mock_trajectory("li.zarr"))
    assert code == 0
    for word in ("li.zarr: 8 frames", "8 x 8 x 8", "every 2 fs", "6.0000", "4 atoms", "4.000000"):
        assert word in out


def test_describe_a_store_with_runs(command, mock_trajectory, tmp_path):
    mock_trajectory("li.zarr/run-1")
    mock_trajectory("li.zarr/run-2", n_frames=4)
    code, out, err = command("describe", tmp_path / "li.zarr")
    assert code == 0, err
    assert "run-1" in out and "8 frames" in out and "run-2" in out and "4 frames" in out


def test_errors_are_one_line_not_a_traceback(command, tmp_path, store):
    code, out, err = command("describe", tmp_path / "none.zarr")
    assert code == 2 and out == "" and err.startswith("densitykit: ") and "none.zarr" in err
    code, _, err = command("rollout", tmp_path / "none", store, tmp_path / "out.zarr")
    assert code == 2 and "none.json" in err and "card not found" in err


def test_rollout(command, store, checkpoint, tmp_path):
    out = tmp_path / "out.zarr"
    code, text, _ = command("rollout", checkpoint, store, out, "--steps", 3, "--frame", 2)
    assert code == 0 and "out.zarr: 4 frames" in text and "every 12 fs" in text
    ds, data = open_trajectory(out), load_pairs(store, "test", 12.0)
    np.testing.assert_array_equal(ds.density[0], data.states[2, 0])
    np.testing.assert_allclose(ds.time, data.times[2] + 12.0 * np.arange(4))
    assert ds.attrs["checkpoint"] == str(checkpoint) and "li.zarr" in ds.attrs["initial"]
    np.testing.assert_allclose(ds.n_electrons, 4, rtol=1e-5)
    code, _, err = command("rollout", checkpoint, store, out, "--steps", 3)
    assert code == 2 and "already exists" in err


def test_rollout_with_a_thermostat(command, store, checkpoint, tmp_path):
    runs = []
    for name, options in (("free", []), ("held", ["--thermostat", 30])):
        code, _, _ = command(
            "rollout", checkpoint, store, tmp_path / f"{name}.zarr", "--steps", 2, *options
        )
        assert code == 0
        runs.append(open_trajectory(tmp_path / f"{name}.zarr").density.values)
    np.testing.assert_array_equal(runs[0][:2], runs[1][:2])  # the rate is felt one step later
    assert (runs[0][2] != runs[1][2]).any()


def test_rollout_from_a_frame_that_is_not_there(command, store, checkpoint, tmp_path):
    code, _, err = command("rollout", checkpoint, store, tmp_path / "o.zarr", "--frame", 99)
    assert code == 2 and "99" in err


def test_evaluate(command, store, checkpoint, tmp_path):
    pairs = load_pairs(store, "test", 12.0)
    options = {"cell": pairs.cell, "progress": False}
    rollout(load_model(checkpoint), pairs.states[0], 4, path=tmp_path / "out.zarr", **options)
    code, out, _ = command("evaluate", store, checkpoint, "--rollouts", tmp_path / "out.zarr")
    assert code == 0
    intervals, wide = out.split("\n\n")
    assert intervals.split()[:5] == ["model", "metric", "value", "low", "high"]
    header, *lines = wide.splitlines()
    for word in ("one-step l1", "one-step l2", "value-sJSD", "S(q) error", "electron drift"):
        assert word in header
    found = {line.split("  ")[0]: line for line in lines}
    names = {"tiny", "out", "Fourier linear map", "POD + linear map", "persistence", "mean field"}
    assert names <= found.keys()
    # persistence by hand
    now, later = (x[:, 0].flatten(1).double() for x in pairs[:])
    l1 = ((later - now).abs().sum(1) / later.sum(1)).mean()
    assert f"{l1:.4g}" in found["persistence"]
    l1, l2 = found["POD + linear map"].split()[4:6]
    assert float(l1) > 0 and float(l2) > 0  # a number that is not finite would show as "-"


def test_evaluate_the_cost(command, store, checkpoint):
    attrs = zarr.open_group(store, mode="r+").attrs
    attrs.update({"seconds_per_step_one_core": 2.7, "time_step_fs": 3.0})
    code, out, _ = command("evaluate", store, checkpoint, "--cost")
    assert code == 0 and "seconds per step" in out and "speed-up" in out


@pytest.mark.parametrize("model", ["surrogate", "latent"])
def test_train(model, command, store, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    out = tmp_path / "models" / "new.safetensors"
    words = ["--steps", 3, "--autoencoder-steps", 2, "--batch", 1, "--run-dir", tmp_path / "run"]
    code, text, _ = command("train", model, store, out, *words)
    torch.set_num_threads(threads)
    assert code == 0 and str(out) in text
    provenance = read_provenance(out)
    assert provenance["data"] == f"{store}, split train"
    assert provenance["command"].startswith(f"densitykit train {model}")
    assert provenance["last"]["step"] == 2 and np.isfinite(provenance["last"]["loss"])
    assert provenance["last"]["validation_l2"] > 0
    state = load_pairs(store, "test", 12.0).states[:1]
    found = load_model(out)(state)
    assert found.shape == state.shape and torch.isfinite(found).all()


def test_train_and_roll_out_an_emulator_with_nuclei(command, tmp_path):
    run, path = liquid_run(frames=46), tmp_path / "liquid.zarr"
    options = {"grid": run.density.shape[1:], "cell": run.cell.values, "numbers": [3] * 8}
    with create_trajectory(path, n_frames=46, allow_negative=True, **options) as writer:
        for i in range(46):
            frame = run.isel(time=i)
            atoms = {k: frame[k].values for k in ("positions", "velocities", "forces")}
            writer.append(frame.density.values, float(frame.time), **atoms)
    bounds = {"train": (0, 24), "validation": (24, 32), "test": (32, 46)}
    write_splits(path, {k: {"run": ".", "start": a, "stop": b} for k, (a, b) in bounds.items()})
    out, film = tmp_path / "liquid-nuclear.safetensors", tmp_path / "film.zarr"
    words = ["--steps", 2, "--batch", 2, "--run-dir", tmp_path / "state", "--threads", 1]
    code, _, err = command("train", "nuclear", path, out, "--volumes", path, *words)
    assert code == 2 and "variable 'energy' is missing" in err
    code, _, err = command("train", "nuclear", path, out, *words)
    assert code == 0, err
    # as many steps as fit into the 8 frames of the validation split
    assert "validation_l2_after_3" in read_provenance(out)["last"]
    code, text, err = command("rollout", out, path, film, "--steps", 3, "--thermostat", 100)
    assert code == 0 and "film.zarr: 4 frames" in text, err
    code, text, err = command("evaluate", path, out, "--rollouts", film)
    assert code == 0 and "liquid-nuclear" in text, err
