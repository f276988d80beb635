"""Variants, and that nothing is trained twice."""

import numpy as np
import pandas as pd
import pytest
import torch

from densitykit.data.windows import load_windows
from densitykit.io.splits import write_splits
from densitykit.models import LatentDiffusion, save_model
from experiments import ablations


@pytest.fixture
def setting(mock_trajectory, tmp_path):
    store = mock_trajectory("li.zarr", n_frames=60)
    bounds = {"train": (0, 30), "test": (30, 60)}
    write_splits(store, {k: {"run": ".", "start": a, "stop": b} for k, (a, b) in bounds.items()})
    torch.manual_seed(0)
    card = {"mu": -2.6, "sigma": 0.3, "eps": 0.01, "horizon": 4.0, "latent_channels": 2}
    card |= {"autoencoder_width": 8, "autoencoder_blocks": 1}
    model = LatentDiffusion(**card, widths=(8,), blocks=(1,))
    donor = save_model(model, tmp_path / "donor", card | {"widths": [8], "blocks": [1]})
    options = {"seeds": [0], "steps": 2, "autoencoder_steps": 2}
    return store, donor, tmp_path / "rows.csv", options | {"run_dir": tmp_path / "runs"}


@pytest.fixture
def small(monkeypatch):
    """Nets and times that suit frames 2 fs apart on a grid of 8 points."""
    monkeypatch.setattr(ablations, "SMALL", {"widths": (8,), "blocks": (1,)})
    monkeypatch.setattr(ablations, "LEADS", (8.0, 16.0))
    of_lithium = {"U-Net": 4.0, "U-Net, 6 fs": 2.0, "U-Net, 24 fs": 8.0, "U-Net, no rate": 4.0}
    scaled = {k: ablations.VARIANTS[k]._replace(horizon=h) for k, h in of_lithium.items()}
    monkeypatch.setattr(ablations, "VARIANTS", ablations.VARIANTS | scaled)
    return scaled


def test_rows_grow_and_are_not_made_twice(setting, small, monkeypatch):
    store, donor, out, options = setting
    rows = ablations.run_ablations(store, donor, out, **options)
    assert list(rows.columns) == ablations.COLUMNS
    assert set(rows.variant) == set(ablations.VARIANTS)
    assert np.isfinite(rows.value).all()
    metrics = rows.groupby("variant").metric.agg(set)
    lengths = {"one-step l1", "one-step l2", "l2 after 8 fs", "l2 after 16 fs"}
    assert (metrics == lengths).all()
    # the term alone differs, so after two steps all are close, and none the same
    errors = rows[rows.metric == "one-step l2"].set_index("variant").value
    assert errors.nunique() == len(ablations.VARIANTS)
    errors = errors[["no sJSD", "spatial", "value", "no conditioning noise"]]
    assert np.ptp(errors) < 0.05 * errors.mean()
    table = rows.pivot_table("value", "variant", "metric")
    # one step of 8 fs, two of 4; the first is what its one-step error says, of other states
    one, after = table["one-step l2"], table["l2 after 8 fs"]
    assert after["U-Net, 24 fs"] == pytest.approx(one["U-Net, 24 fs"], rel=0.25)
    assert after["U-Net"] > 1.3 * one["U-Net"]

    def fail(*arguments, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(ablations, "train_latent_diffusion", fail)
    monkeypatch.setattr(ablations, "train", fail)
    again = ablations.run_ablations(store, donor, out, **options)
    pd.testing.assert_frame_equal(again, rows)
    with pytest.raises(AssertionError, match="trained again"):
        ablations.run_ablations(store, donor, out, **options | {"seeds": [0, 1]})


def test_samplers_share_a_training_and_nothing_else():
    shared = {name: ablations._trained_as(name) for name in ablations.VARIANTS}
    assert shared.pop("16 sampler steps") == "4 sampler steps"
    assert all(a == b for a, b in shared.items())


def test_at_rest_nothing_is_known_of_rates(setting):
    """A state has the density of the window and no rate; nor has what a net is asked to give."""
    windows = load_windows(setting[0], "train", 4.0)
    model = ablations.RestingUNet(-2.6, 0.3, 0.01, 4.0, widths=(8,), blocks=(1,))
    fields = model.init(windows[3]).fields
    assert torch.equal(fields[:, 0], windows[3].at(0)) and not fields[:, 1].any()
    now, later = model.normalised_pair(windows[3], windows.lag)
    assert not now[:, 1].any() and not later[:, 1].any() and now[:, 0].any()


def test_latents_of_their_own_size(setting, small, monkeypatch):
    """A variant with channels trains an autoencoder; the others take that of the checkpoint."""
    store, donor, out, options = setting
    trained = {}
    train = ablations.train_latent_diffusion

    def watch(model, pairs, **options):
        train(model, pairs, **options)
        name = options["run_dir"].name.split(",")[0]
        trained[name] = (len(model.latent_mean), options["autoencoder_steps"])

    monkeypatch.setattr(ablations, "train_latent_diffusion", watch)
    names = ["no sJSD", "latent of 4 channels", "latent of 16 channels"]
    ablations.run_ablations(store, donor, out, variants=names, **options)
    assert trained == {names[0]: (2, 0), names[1]: (4, 2), names[2]: (16, 2)}
