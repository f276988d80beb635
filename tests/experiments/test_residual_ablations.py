"""Ablations of the net that draws densities, on short stretches of the bundled run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from densitykit.errors import CheckpointError
from densitykit.io.reader import open_trajectory
from experiments import residual_ablations as ablations

DATA = Path(__file__).parents[2] / "data"
STORE = DATA / "lithium-800K.zarr"
CHECKPOINTS = DATA / "checkpoints"
TINY = {"widths": (8,), "blocks": (1,)}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ninety frames, tiny nets, 48 fs."""
    whole = ablations.open_split
    monkeypatch.setattr(ablations, "open_split", lambda *a: whole(*a).isel(time=slice(90)))
    monkeypatch.setattr(ablations, "DRIVEN", 48.0)
    tiny = {k: v._replace(net=TINY) for k, v in ablations.RESIDUALS.items()}
    monkeypatch.setattr(ablations, "RESIDUALS", tiny)


def run(out: Path, names: list[str], checkpoint: str = "lithium-nuclear", seed: int = 0):
    options = {"variants": names, "seeds": [seed], "steps": 3, "run_dir": out.parent / "runs"}
    options["large"] = open_trajectory(DATA / "lithium-256.zarr").isel(time=[0])
    return ablations.run_residual_ablations(STORE, CHECKPOINTS / checkpoint, out, **options)


def test_rows_grow_and_are_not_made_twice(
    short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["no memory", "norm at each point", "steps of 24 fs"]
    out = tmp_path / "rows.csv"
    rows = run(out, names)
    assert set(rows.variant) == set(names) and np.isfinite(rows.value).all()
    table = rows.pivot_table("value", "variant", "metric")
    errors = table.drop(columns="seconds of training")
    times, places = ("after a step", "after 48 fs"), ("at rest", "at rest, larger cell")
    assert set(errors) == {f"rel l2 {x}" for x in times + places}
    assert errors.stack().between(0.005, 0.1).all()
    assert errors["rel l2 after 48 fs"].nunique() == len(names)

    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(ablations, "train_emulator", fail)
    pd.testing.assert_frame_equal(run(out, names), rows)
    with pytest.raises(AssertionError, match="trained again"):
        run(out, names, seed=1)


def test_variants_change_one_thing_each() -> None:
    base = ablations.RESIDUALS["small net"]
    for name, residual in ablations.RESIDUALS.items():
        changed = sum(a != b for a, b in zip(residual, base, strict=True))
        assert changed == (name != "small net") + (name.count(",") > 0)


def test_a_forgetful_net_knows_nothing_of_its_memory() -> None:
    torch.manual_seed(0)
    net = ablations.ForgetfulNet(**TINY)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    base, before, e = torch.randn(3, 1, 8, 8, 8)
    drawn = net(base, before, e)
    assert drawn.std() > 0 and torch.equal(drawn, net(base, before, 0 * e))
    assert not torch.equal(drawn, net(base, 2 * before, e))


@pytest.mark.parametrize(
    "name", ["small receptive field, norm at each point", "small receptive field", "small net"]
)
def test_how_far_a_net_sees(name) -> None:
    """Noise half an edge away: six convolutions on patches of two do not reach it."""
    torch.manual_seed(0)
    residual = ablations.RESIDUALS[name]
    net = residual.kind(**residual.net)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    base, before, e = torch.randn(3, 1, 32, 8, 8)
    far = base.clone()
    far[:, 16] += 1.0
    change = abs(net(far, before, e) - net(base, before, e)).amax(dim=(0, 2, 3))
    assert change[16] > 1e-3
    assert (change[:2].max() < 1e-5) == (name == "small receptive field, norm at each point")


def test_other_models_have_no_residual_net(short: None, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a SurrogateUNet; give an emulator with nuclei"):
        run(tmp_path / "rows.csv", ["small net"], "lithium-unet")
