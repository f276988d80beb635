"""Nonsense, by the thousand: each gives a result or one line that says what is wrong.

Command lines, the metadata of stores, and checkpoints are made from good ones by random changes;
the command line is called in this process. An error that nobody has thought of would show as
"unexpected", a traceback as an exception. Here a few of each; all of them with `pytest -m slow`.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from densitykit.cli import main, parser
from densitykit.data.windows import load_windows
from densitykit.errors import DensityKitError
from densitykit.io.splits import write_splits
from densitykit.models import SurrogateUNet, load_model, save_model
from densitykit.models.checkpoint import _digest
from densitykit.rollout import rollout

FEW, MANY = 60, 10_000
ALL = [pytest.mark.slow, pytest.mark.timeout(7200)]
counts = pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=ALL)])

#: what stands where JSON has a value, a file has bytes, a command line a word
WEIRD = [None, True, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e-300, 1e300, math.nan, math.inf]
WEIRD += [
    "",
    "x",
    "nan",
    "\u0000",
    "é" * 300,
    [],
    [[]],
    {},
    {"x": 1},
    ["time"],
    [1, -2, 3],
    [4] * 2000,
]
WORDS = [
    "0",
    "-1",
    "1",
    "2",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e-300",
    "1e300",
    "0.5",
    "",
    " ",
    "x",
]
WORDS += ["9" * 30, "--", "-x", "--steps", "é", "1,5", "0x10", "None", "test", "train", "*"]


@pytest.fixture
def tiny(tmp_path: Path, mock_trajectory: Callable[..., Path], monkeypatch: Any) -> Path:
    """Give a folder with a small store, a checkpoint, files that are neither; work in it."""
    path = mock_trajectory("good.zarr", n_frames=16, grid=(4, 4, 4))
    parts = {"train": (0, 8), "validation": (8, 12), "test": (12, 16)}
    write_splits(path, {n: {"run": ".", "start": a, "stop": b} for n, (a, b) in parts.items()})
    torch.manual_seed(0)
    card = {"mu": -4.0, "sigma": 0.5, "eps": 0.01, "horizon": 2.0, "widths": [8], "blocks": [1]}
    save_model(SurrogateUNet(**card, patch=1), tmp_path / "model", {**card, "patch": 1})
    (tmp_path / "text").write_text("no cube\n" * 9)
    (tmp_path / "empty.cube").touch()
    (tmp_path / "noise.xsf").write_bytes(np.random.default_rng(0).bytes(300))
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def called(words: list[str], monkeypatch: Any, capsys: Any) -> str:
    """Call the command line; give how it ended, after a look at what it says."""
    monkeypatch.setattr(sys, "argv", ["densitykit", *words])
    try:
        code = main()
    except SystemExit as stop:
        code = f"usage {stop.code}"
    err = capsys.readouterr().err
    lines = [x for x in err.splitlines() if x.startswith("densitykit: ")]
    assert "unexpected" not in err and "Traceback" not in err, (words, err)
    assert code in (0, 1, 2, "usage 0", "usage 2"), (words, code)
    if code == 2:  # one line, after progress and warnings
        assert err.splitlines()[-1] == lines[-1] and len(lines[-1]) > 20, (words, err)
    return str(code)


# --- command lines ---------------------------------------------------------------------------


PATHS = [
    "good.zarr",
    "good.zarr/density",
    "model",
    "model.json",
    "text",
    "empty.cube",
    "noise.xsf",
]
PATHS += ["folder", "nothere", "", ".", "/dev/null", "a/b/c", "x" * 300, "out.zarr", "text/x", "~"]
#: so that a good one is soon done
SHORT = {"train": "--steps 1 --autoencoder-steps 1 --threads 1", "rollout": "--steps 1"}
SHORT |= {"generate": "--steps 1 --size 8", "predict": "--spacing 1"}


def options(command: str) -> list[Any]:
    """Give the options of a command, as its parser knows them."""
    commands = parser()._subparsers._group_actions[0].choices
    found = commands[command]
    if command == "generate":
        found = found._subparsers._group_actions[0].choices["chain"]
    long = ("help", "dataset", "cost")
    return [a for a in found._actions if a.option_strings and a.dest not in long]


def command_line(rng: np.random.Generator) -> list[str]:
    """One that may be good, with a few words that need not be."""
    commands = (
        "validate describe convert export train predict rollout evaluate generate convergence"
    )
    command = str(rng.choice(commands.split()))
    words = [command]
    if command == "generate":
        words += ["chain"]
    if command == "train":
        words += [
            str(
                rng.choice(
                    ["latent", "surrogate", "nuclear", "deep-density", "deep-density-network"]
                )
            )
        ]
    right = {"train": ["good.zarr", "new"], "rollout": ["model", "good.zarr", "film.zarr"]}
    right |= {"evaluate": ["good.zarr", "model"], "export": ["good.zarr", "a.cube"]}
    right |= {"convert": ["c.zarr", "text", "--time-step", "1"], "generate": ["chain.zarr"]}
    right |= {"predict": ["model", "text", "p.cube"], "convergence": ["lithium", "--seed", "-1"]}
    given = list(right.get(command, ["good.zarr"]))
    for i in range(len(given)):
        if rng.random() < 0.3:
            given[i] = str(rng.choice(PATHS))
    words += given
    for _ in range(rng.integers(3) if options(command) else 0):
        option = rng.choice(options(command))
        words.append(option.option_strings[-1])
        if option.nargs != 0:
            pool = PATHS if rng.random() < 0.2 else WORDS
            words += [
                str(rng.choice(pool))
                for _ in range(option.nargs if isinstance(option.nargs, int) else 1)
            ]
    if rng.random() < 0.1:
        words.pop(rng.integers(len(words)))
    return [*words, *SHORT.get(words[0] if words else "", "").split()]


@counts
def test_command_lines(count: int, tiny: Path, monkeypatch: Any, capsys: Any) -> None:
    rng, ends = np.random.default_rng(0), Counter()
    threads = torch.get_num_threads()
    for _ in range(count):
        ends[called(command_line(rng), monkeypatch, capsys)] += 1
    torch.set_num_threads(threads)
    assert ends["2"] and ends["usage 2"] and ends["0"], ends
    print(f"{count} command lines: {dict(ends)}")


# --- metadata --------------------------------------------------------------------------------


def changed(value: Any, rng: np.random.Generator) -> Any:
    """Give JSON with one value, somewhere in it, gone, moved or another."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return WEIRD[rng.integers(len(WEIRD))]
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = keys[rng.integers(len(keys))]
    copy = type(value)(value)
    if rng.random() < 0.1:
        del copy[key]
    else:
        copy[key] = changed(value[key], rng)
    return copy


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Give a JSON file that somebody has edited, or a disk."""
    if rng.random() < 0.7:
        return json.dumps(changed(json.loads(content), rng)).encode()
    data = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        data[rng.integers(len(data))] = rng.integers(256)
    return bytes(data[: rng.integers(len(data))] if rng.random() < 0.3 else data)


@counts
def test_metadata(count: int, tiny: Path, monkeypatch: Any, capsys: Any) -> None:
    rng, ends = np.random.default_rng(1), Counter()
    files = sorted(Path("good.zarr").rglob("zarr.json"))
    commands = ["validate good.zarr", "describe good.zarr", "export good.zarr a.cube --frame 3"]
    for _ in range(count):
        file = files[rng.integers(len(files))]
        content = file.read_bytes()
        file.write_bytes(damaged(content, rng))
        ends[called(str(rng.choice(commands)).split(), monkeypatch, capsys)] += 1
        file.write_bytes(content)
    assert ends["1"] and ends["2"] and set(ends) <= {"0", "1", "2"}, ends
    assert ends["0"] <= count / 50, ends  # a byte may be put in place of itself
    print(f"{count} metadata: {dict(ends)}")


# --- checkpoints -----------------------------------------------------------------------------


def spoiled(tensors: dict[str, torch.Tensor], rng: np.random.Generator) -> dict[str, Any]:
    """Give weights of which one is gone, or has another name, shape, type or value."""
    name = sorted(tensors)[rng.integers(len(tensors))]
    x, rest = tensors[name], {k: v for k, v in tensors.items() if k != name}
    value = torch.full_like(x, [math.nan, math.inf, 1e38, 0.0][rng.integers(4)])
    choices = [rest, rest | {name + "x": x}, rest | {name: x.double()}, rest | {name: x[:1]}]
    choices += [rest | {name: x.flatten()}, rest | {name: value}, rest | {name: x.to(torch.int32)}]
    return choices[rng.integers(len(choices))]


@counts
def test_checkpoints(count: int, tiny: Path) -> None:
    """With the right digest, as if they had been saved so; and with bytes that a disk changed."""
    rng, ends = np.random.default_rng(2), Counter()
    content = Path("model.safetensors").read_bytes()
    card, tensors = Path("model.json").read_text(), load(content)
    window = load_windows("good.zarr", "test", 2.0)[0]
    Path("model.json").unlink()
    for _ in range(count):
        kind = rng.integers(3)
        if kind == 0:
            data = bytearray(content)
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
            data = data[: rng.integers(len(data))] if rng.random() < 0.3 else data
        else:
            text = damaged(card.encode(), rng).decode(errors="ignore") if kind == 1 else card
            weights = tensors if kind == 1 else spoiled(tensors, rng)
            bare = save(weights)
            data = save(weights, {"card": text, "sha256": _digest(text, bare)})
        Path("model.safetensors").write_bytes(data)
        ends[used(window)] += 1
    assert ends["refused"] and ends["used"], ends
    print(f"{count} checkpoints: {dict(ends)}")


def used(window: Any) -> str:
    """Load the checkpoint; what loads is a model that steps, or says why it does not."""
    try:
        model = load_model("model")
    except DensityKitError as error:
        assert "model.safetensors: " in str(error) and "; " in str(error), error
        assert "\n" not in str(error), error
        return "refused"
    assert all(p.isfinite().all() for p in model.state_dict().values())
    try:
        rollout(model, window, 1, progress=False)
    except DensityKitError as error:
        assert "\n" not in str(error), error
        return "no step"
    return "used"
