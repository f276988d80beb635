"""The command line: exit codes, messages that name file, variable and fix, each command once."""

from __future__ import annotations

import argparse
import errno
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import zarr

from densitykit import __version__
from densitykit.cli import main, parser
from densitykit.data.windows import load_windows
from densitykit.io.metadata import set_attributes
from densitykit.io.reader import open_trajectory
from densitykit.io.splits import read_splits, write_splits
from densitykit.models import SurrogateUNet, load_model, read_provenance, save_model

SPLITS = {
    "train": {"run": ".", "start": 0, "stop": 20},
    "validation": {"run": ".", "start": 22, "stop": 34},
    "test": {"run": ".", "start": 36, "stop": 170},
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
    path = mock_trajectory("li.zarr", n_frames=170)
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
    assert set(read_splits(tmp_path / "back.zarr")) == {"train", "validation", "test"}
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

    monkeypatch.setattr("densitykit.io.describe.summarise", full)
    expected = (2, "", "densitykit: big.zarr: No space left on device\n")
    assert command("describe", "big.zarr") == expected


def test_what_nobody_has_thought_of_is_one_line_unless_debugged(command, monkeypatch):
    def broken(path: Path) -> str:
        raise LookupError("two\nlines")

    monkeypatch.setattr("densitykit.io.describe.summarise", broken)
    code, out, err = command("describe", "a.zarr")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("densitykit: unexpected LookupError: two lines; please report")
    with pytest.raises(LookupError):
        command("describe", "a.zarr", "--debug")

    def interrupted(path: Path) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("densitykit.io.describe.summarise", interrupted)
    code, _, err = command("describe", "a.zarr")
    assert code == 130 and err.startswith("densitykit: interrupted; the same command")


def test_a_checkpoint_that_cannot_be_written_is_told_before_the_training(command, store):
    code, _, err = command("train", "latent", store, "x" * 300)
    assert code == 2 and "File name too long" in err
    code, _, err = command("train", "latent", store, store / "zarr.json" / "m")
    assert code == 2 and err.count("\n") == 1


def test_a_batch_that_no_memory_holds_is_refused(command, store, tmp_path):
    words = ["--horizon", 4, "--steps", 1, "--batch", 100_000, "--run-dir", tmp_path / "r"]
    attempt = ["train", "surrogate", store, tmp_path / "m", *words]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("densitykit.data.windows._memory", lambda: 8e8)
        code, _, err = command(*attempt)
    assert code == 2 and "100000 windows at once take 1 GB; take fewer (--batch)" in err


def test_the_console_command_is_declared():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"densitykit": "densitykit.cli:main"}


# --- validate --------------------------------------------------------------------------------


def test_a_good_store_is_valid(command, mock_trajectory):
    path = mock_trajectory()
    assert command("validate", path) == (0, f"{path}: valid\n", "")


def test_upgrade(command, mock_trajectory):
    """What is in the present version stays; edited metadata are accepted, and only so."""
    path = mock_trajectory()
    says = f"{path}: nothing to do, it is in this version\n"
    assert command("upgrade", path) == (0, says, "")
    zarr.open_group(path).attrs["title"] = "mine"
    assert command("describe", path)[0] == 2
    assert command("upgrade", path) == (0, f"{path}: rewritten: .\n", "")
    assert command("validate", path)[0] == 0 and open_trajectory(path).attrs["title"] == "mine"


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
    ds, first = open_trajectory(out), load_windows(store, "test", 12.0)[2]
    np.testing.assert_array_equal(ds.density[0], first.at(0)[0])
    np.testing.assert_allclose(ds.time, float(first.now) + 12.0 * np.arange(4))
    assert ds.attrs["checkpoint"] == str(checkpoint) and "li.zarr" in ds.attrs["initial"]
    np.testing.assert_allclose(ds.n_electrons, 4, rtol=1e-5)
    code, _, err = command("rollout", checkpoint, store, out, "--steps", 3)
    assert code == 2 and "start is 80 fs" in err and "not 76 fs" in err and "--restart" in err
    words = ["rollout", checkpoint, store, out, "--frame", 2]
    assert "6 frames" in command(*words, "--steps", 5)[1]  # it goes on
    assert "4 frames" in command(*words, "--steps", 3, "--restart", "--seed", 1)[1]
    code, _, err = command("rollout", checkpoint, store, store, "--steps", 3)
    assert code == 2 and "is no such rollout" in err


def test_rollout_with_a_thermostat(command, store, checkpoint, tmp_path):
    runs = []
    for name, options in (("free", []), ("held", ["--thermostat", 30])):
        words = ["rollout", checkpoint, store, tmp_path / f"{name}.zarr", "--steps", 2]
        assert command(*words, *options)[0] == 0
        runs.append(open_trajectory(tmp_path / f"{name}.zarr").density.values)
    np.testing.assert_array_equal(runs[0][:2], runs[1][:2])  # the rate is felt one step later
    assert (runs[0][2] != runs[1][2]).any()


def test_rollout_from_a_frame_that_is_not_there(command, store, checkpoint, tmp_path):
    code, _, err = command("rollout", checkpoint, store, tmp_path / "o.zarr", "--frame", 9999)
    assert code == 2 and "9999" in err


def test_rollout_of_what_does_not_move(command, tmp_path):
    data = Path(__file__).parents[1] / "data"
    words = data / "checkpoints" / "autoencoder", data / "lithium-800K.zarr"
    code, _, err = command("rollout", *words, tmp_path / "o.zarr")
    assert code == 2 and "no dynamics" in err and not (tmp_path / "o.zarr").exists()


def test_evaluate(command, store, checkpoint, tmp_path):
    out, table = tmp_path / "out.zarr", tmp_path / "table.csv"
    assert command("rollout", checkpoint, store, out, "--steps", 24)[0] == 0
    words = ["evaluate", store, checkpoint, "--rollouts", out, "--out", table]
    code, text, err = command(*words)
    assert code == 0, err
    rows = pd.read_csv(table)
    names = {"tiny", "out", "Fourier linear map", "POD + linear map", "persistence", "mean field"}
    assert names <= set(rows["model"]) and all(name in text for name in names)
    assert {"model", "metric", "value", "low", "high"} <= set(rows.columns)
    # persistence by hand
    windows = load_windows(store, "test", 12.0)
    now, later = (windows[:].at(k).flatten(1).double() for k in (0, windows.lag))
    l1 = ((later - now).abs().sum(1) / later.sum(1)).mean()
    found = rows.query("model == 'persistence' and metric == 'one-step l1'").value.item()
    assert found == pytest.approx(float(l1), rel=1e-5)


MINE = """
class Still:  # what does not move is persistence
    context, horizon = 1, 12.0
    init = staticmethod(lambda window: window.at(0))
    step = staticmethod(lambda state, generator=None: state)
    density = staticmethod(lambda state: state)
"""


def test_evaluate_an_emulator_of_ones_own(command, store, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", store, "--emulator", "mine:Still", "--out", "table.csv"]
    assert command(*words)[0] == 0
    rows = pd.read_csv("table.csv").query("metric == 'one-step l1'").set_index("model").value
    assert rows["mine:Still"] == pytest.approx(rows["persistence"], rel=1e-9)
    code, _, err = command("evaluate", store, "--emulator", "mine:Gone")
    assert code == 2 and "emulator 'mine:Gone': AttributeError" in err
    code, _, err = command("evaluate", store, "--emulator", "pathlib:Path")
    assert code == 2 and "a PosixPath is no emulator: context" in err


def test_a_static_map_is_no_emulator(command, store):
    ethane = Path(__file__).parents[1] / "data" / "checkpoints" / "deep-density-ethane"
    for words in (["evaluate", store, ethane], ["rollout", ethane, store, store / "x.zarr"]):
        code, _, err = command(*words)
        assert code == 2 and "a LinearDensity is no emulator: context, horizon" in err


def test_what_is_no_structure(command, tmp_path):
    (tmp_path / "text").write_text("no atoms\n" * 9)
    ethane = Path(__file__).parents[1] / "data" / "checkpoints" / "deep-density-ethane"
    code, _, err = command("predict", ethane, tmp_path / "text", tmp_path / "a.cube")
    assert code == 2 and "text: not readable" in err and "that ASE reads" in err


def test_a_rollout_too_short_to_judge_is_named(command, store, checkpoint, tmp_path):
    assert command("rollout", checkpoint, store, tmp_path / "out.zarr", "--steps", 4)[0] == 0
    code, _, err = command("evaluate", store, "--rollouts", tmp_path / "out.zarr")
    assert code == 2 and "out.zarr: 5 frames are too short to judge" in err


def test_evaluate_the_cost(command, store, checkpoint):
    set_attributes(store, seconds_per_step_one_core=2.7, time_step_fs=3.0)
    code, out, _ = command("evaluate", store, checkpoint, "--cost")
    assert code == 0 and "seconds per step" in out and "speed-up" in out


@pytest.mark.parametrize("model", ["surrogate", "latent"])
def test_train(model, command, store, tmp_path):
    threads = torch.get_num_threads()
    out = tmp_path / "models" / "new.safetensors"
    words = ["--steps", 3, "--autoencoder-steps", 2, "--batch", 1, "--run-dir", tmp_path / "run"]
    code, text, err = command("train", model, store, out, "--horizon", 4, *words)
    torch.set_num_threads(threads)
    assert code == 0 and str(out) in text, err
    provenance = read_provenance(out)
    assert provenance["data"] == f"{store}, split train"
    assert provenance["command"].startswith(f"densitykit train {model}")
    assert provenance["last"]["step"] == 2 and np.isfinite(provenance["last"]["loss"])
    assert provenance["last"]["validation_l2"] > 0
    emulator = load_model(out)
    assert emulator.horizon == 4
    code, text, err = command("rollout", out, store, tmp_path / "film.zarr", "--steps", 2)
    assert code == 0 and "every 4 fs" in text, err


def test_train_and_use_the_network_of_deep_density(command, store, tmp_path):
    threads, out = torch.get_num_threads(), tmp_path / "network.safetensors"
    words = ["--steps", 3, "--batch", 16, "--run-dir", tmp_path / "run"]
    code, text, err = command("train", "deep-density-network", store, out, *words)
    torch.set_num_threads(threads)
    assert code == 0 and str(out) in text, err
    assert read_provenance(out)["last"]["points"] == 48
    structure = tmp_path / "two.xyz"
    structure.write_text("2\n\nLi 0 0 0\nLi 0 0 2.5\n")
    grid = ["--grid", 4, 5, 6]
    code, _, err = command("predict", out, structure, tmp_path / "two.cube", *grid)
    assert code == 0, err
    assert (tmp_path / "two.cube").stat().st_size > 100


def test_a_horizon_that_the_frames_do_not_have(command, store, tmp_path):
    code, _, err = command("train", "surrogate", store, tmp_path / "m", "--horizon", 5)
    assert code == 2 and "choose 4 or 6 fs" in err and err.count("\n") == 1
