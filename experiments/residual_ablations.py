r"""What a residual net needs: memory, noise on it, steps in a row, width, time step, reach.

In the emulator of `densitykit.models.nuclear` the density of given nuclei is a superposition and
what a net adds to it, which sees what it has added before. Given the path of the nuclei, that net
can be examined alone: it is driven along the path of a held-out run, and its error told after one
step and after many. A net that lasts has the same error after both; one whose memory feeds on its
own errors does not. Small nets here, trained briefly; one thing is changed at a time.

A net that has seen one small cell alone may take its images, or means over the cell, for physics.
Two variants cannot: one sees half an edge of that cell, in another each point is normalised alone
(a group norm takes means over the cell). A larger cell tells, if one is given: the density of its
nuclei at rest, beside that of the held-out run's.

One row per (variant, seed, metric) goes to a CSV file. What is there is not computed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import xarray as xr
from lightning_fabric import Fabric
from torch import Tensor, nn

from densitykit.data.windows import Windows
from densitykit.io.reader import open_split, open_trajectory
from densitykit.metrics import relative_l2
from densitykit.models import NuclearEmulator
from densitykit.models.nuclear.emulator import ResidualNet
from densitykit.models.nuclear.force_field import as_double, numbers_of
from densitykit.nn.layers import ResidualBlock
from densitykit.training.nuclear import residual_error, train_emulator
from experiments.arguments import ablation_parser, load_nuclear, print_spread, run_script
from experiments.report import run_missing

__all__ = ["RESIDUALS", "Residual", "run_residual_ablations"]

SMALL = {"widths": (24, 48), "blocks": (1, 2)}
SHORT = {"widths": (48,), "blocks": (2,)}  # six convolutions of patches: half of 24 points
QUIET = {"memory_noise": 0.0, "white_noise": 0.0}


class ForgetfulNet(ResidualNet):
    """Draws the residual from the superposition and its change alone."""

    def advance(self, fields: Tensor) -> Tensor:
        return self.net(torch.cat([fields[:, :2], 0 * fields[:, 2:]], dim=1))


class PointNorm(nn.Module):
    """Channels of each point scaled to unit mean square, whatever the rest of the cell is like."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * (x.square().mean(dim=1, keepdim=True) + 1e-5).rsqrt()


class PointwiseNet(ResidualNet):
    """Normalises each point alone."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        for block in self.net.modules():
            if isinstance(block, ResidualBlock):
                block.norm = PointNorm(block.norm.num_channels)


class Residual(NamedTuple):
    """Arguments of the loss and of the net, time of a step in fs, steps in a row, class."""

    loss: Mapping[str, float] = {}  # noqa: RUF012
    net: Mapping[str, Any] = SMALL
    horizon: float = 12.0
    unroll: int = 1
    kind: type[ResidualNet] = ResidualNet


RESIDUALS = {
    "small net": Residual(),
    "no memory": Residual(kind=ForgetfulNet),
    "no noise": Residual(QUIET),
    "no white noise": Residual({"white_noise": 0.0}),
    "no shifted noise": Residual({"memory_noise": 0.0}),
    "two steps in a row": Residual(unroll=2),
    "two steps in a row, no noise": Residual(QUIET, unroll=2),
    "steps of 6 fs": Residual(horizon=6.0),
    "steps of 24 fs": Residual(horizon=24.0),
    "norm at each point": Residual(kind=PointwiseNet),
    "small receptive field": Residual(net=SHORT),
    "small receptive field, norm at each point": Residual(net=SHORT, kind=PointwiseNet),
    "small receptive field, no memory": Residual(net=SHORT, kind=ForgetfulNet),
    "twice as wide": Residual(net=SMALL | {"widths": (48, 96)}),
}
COLUMNS = ["variant", "seed", "steps", "metric", "value"]
DRIVEN = 480.0  # fs along the held-out path


def run_residual_ablations(
    data: str | Path,
    checkpoint: str | Path,
    out: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    variants: Sequence[str] = tuple(RESIDUALS),
    steps: int = 1000,
    run_dir: Path = Path("runs/residuals"),
    large: xr.Dataset | None = None,
) -> pd.DataFrame:
    """Train and judge every variant with every seed, or what of it is not in the file yet.

    Parameters
    ----------
    data
        Store with splits train and validation; the latter judges.
    checkpoint
        Of a `NuclearEmulator`, whose superposition all variants share.
    out
        CSV file; rows are added to what it holds.
    seeds
        Of initial weights and training.
    variants
        Names of `RESIDUALS`.
    steps
        Of each training.
    run_dir
        States of trainings; an interrupted one is continued.
    large
        Frames of a larger cell, for one more metric.

    Returns
    -------
    pd.DataFrame
        All rows of the file: variant, seed, steps, metric, value.
    """

    @cache
    def loaded() -> tuple[NuclearEmulator, xr.Dataset, xr.Dataset]:
        train, held_out = (open_split(data, split).load() for split in ("train", "validation"))
        return load_nuclear(checkpoint), train, held_out

    def judged(variant: str, seed: int, steps: int) -> pd.DataFrame:
        folder = run_dir / f"{variant}, seed {seed}, {steps} steps"
        (model, train, held_out), residual = loaded(), RESIDUALS[variant]
        new = _trained_and_judged(model, train, held_out, residual, seed, steps, folder)
        new["rel l2 at rest"] = _error_at_rest(model, held_out.isel(time=slice(0, None, 20)))
        if large is not None:
            new["rel l2 at rest, larger cell"] = _error_at_rest(model, large)
        return pd.DataFrame({"metric": new.keys(), "value": new.values()})

    wanted = [(v, s, steps) for s in seeds for v in variants]
    return run_missing(out, COLUMNS, COLUMNS[:3], wanted, judged)


def _trained_and_judged(
    model: NuclearEmulator,
    train: xr.Dataset,
    held_out: xr.Dataset,
    variant: Residual,
    seed: int,
    steps: int,
    folder: Path,
) -> dict[str, float]:
    """Relative l2 errors of the density along a held-out path, and the time of the training."""
    torch.manual_seed(seed)
    model.residual_net, model.horizon = variant.kind(**variant.net), variant.horizon
    model.stride = model.residual_net.stride
    rows = train_emulator(
        model,
        train,
        steps=steps,
        seed=seed,
        loss=variant.loss,
        unroll=variant.unroll,
        run_dir=folder,
        ema=0.99,
        fabric=Fabric(accelerator="cpu", devices=1),
    )
    driven = round(DRIVEN / model.horizon)
    windows = Windows(held_out, model.horizon, context=1, steps=driven)
    errors = residual_error(model, windows, every=10)
    after = f"rel l2 after {DRIVEN:g} fs"
    return dict(zip(["rel l2 after a step", after], errors.values(), strict=True)) | {
        "seconds of training": rows[-1]["seconds"]
    }


def _error_at_rest(model: NuclearEmulator, frames: xr.Dataset) -> float:
    """Mean relative l2 error of the density of given nuclei, whatever was before."""
    x = as_double(frames["positions"])
    cell, grid = as_double(frames["cell"]), frames["density"].shape[1:]
    state = model.init_at(x, torch.zeros_like(x), cell, grid, numbers_of(frames))
    state = model.converge_density(state)
    truth = torch.from_numpy(frames["density"].values)
    return float(relative_l2(model.density(state), truth).mean())


def main() -> None:
    of = "emulator with nuclei whose superposition all share"
    parser = ablation_parser(__doc__, RESIDUALS, of, "runs/residuals", steps=1000)
    parser.add_argument("--large", help="store of a larger cell, to judge by as well")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    rows = run_residual_ablations(
        arguments.data,
        arguments.checkpoint,
        arguments.out,
        seeds=arguments.seeds,
        variants=arguments.variants,
        steps=arguments.steps,
        run_dir=arguments.run_dir,
        large=open_trajectory(arguments.large).load() if arguments.large else None,
    )
    print_spread(rows)


if __name__ == "__main__":
    run_script(main)
