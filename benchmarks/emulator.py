"""Where the time of the emulator with nuclei goes, and how fast it is beside ab-initio MD.

    python benchmarks/emulator.py [CHECKPOINT]

One CPU core. Prints milliseconds a step of each part, simulated femtoseconds a second, and the
ratio to ab-initio MD on one core (from the attributes of the trajectory), for 32 and 256 atoms:
everything in every step, also with the net in bfloat16 (twice as fast where the processor has
it); nuclei and superposition only; nuclei only, whose density is drawn when
somebody looks; and nuclei with one force evaluation a step instead of two, in double and in
single precision.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from densitykit.assess import ab_initio_seconds, matrix_rate
from densitykit.data.windows import load_pairs, step_generator
from densitykit.io.reader import open_split
from densitykit.models import load_nuclear
from densitykit.models.nuclear.emulator import (
    Liquid,
    NuclearEmulator,
    supercell,
    thermal_velocities,
)

DATA = "data/lithium-800K.zarr"


def milliseconds(call: Callable[[], object], repeats: int = 15) -> float:
    """Median wall time of a call."""
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return float(1e3 * np.median(times))


def parts(model: NuclearEmulator, liquid: Liquid) -> dict[str, float]:
    """Milliseconds of each part of a step."""
    shape, x = tuple(liquid.base.shape[1:]), liquid.positions
    cell = model.cell(shape)
    fast, single = load_nuclear(CHECKPOINT), load_nuclear(CHECKPOINT)
    fast.substeps = single.substeps = 1
    single.force_field.float()
    generator = step_generator(0, 0)

    def step() -> Tensor:
        return model.density(model.propagate(liquid, generator))

    return {
        "force": milliseconds(lambda: model.force_field.forces(x, cell)),
        "nuclei": milliseconds(lambda: model.move(liquid, generator)),
        "nuclei, one force": milliseconds(lambda: fast.move(liquid, generator)),
        "nuclei, one force, single": milliseconds(lambda: single.move(liquid, generator)),
        "superposition": milliseconds(lambda: model.superposition(x, cell, shape)),
        "residual net": milliseconds(
            lambda: model.residual_net(liquid.base, liquid.base, liquid.residual), 5
        ),
        "everything": milliseconds(step, 5),
        "everything, bfloat16": milliseconds(
            torch.autocast("cpu", torch.bfloat16)(step),
            5,
        ),
    }


CHECKPOINT = sys.argv[1] if len(sys.argv) > 1 else "data/checkpoints/lithium-nuclear"


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    model = load_nuclear(CHECKPOINT)
    test, attrs = load_pairs(DATA, "test", model.horizon), open_split(DATA, "test").attrs
    ab_initio = 1 / ab_initio_seconds(attrs)
    print(f"ab-initio MD, 32 atoms: {ab_initio:.2f} fs of liquid a second, one core")
    small = model.begin(test.given(model, 0)[None])
    x = supercell(small.positions, test.cell)
    v = thermal_velocities(x, model.mass, model.temperature, step_generator(0, 1))
    liquids = {"32": small, "256": model.begin_at(x, v, (48, 48, 48))}
    liquids["32 x 16"] = replace(
        small, **{k: t.repeat(16, *[1] * (t.ndim - 1)) for k, t in vars(small).items()}
    )
    for name, liquid in liquids.items():
        times = parts(model, liquid)
        times["nuclei and superposition"] = times["nuclei"] + times["superposition"]
        print(f"\n{name} atoms{' members' if 'x' in name else ''}")
        for part, ms in times.items():
            line = f"  {part:<26}{ms:>9.2f} ms"
            if part.startswith(("nuclei", "everything")):
                rate = len(liquid.positions) * model.horizon / ms * 1e3
                line += f"{rate:>10.0f} fs/s"
                line += f"{rate / ab_initio:>8.0f} x ab initio" if name != "256" else ""
            print(line)
        if name == "32":
            two = [torch.cat([x, x]) for x in (liquid.base, liquid.base, liquid.residual)]
            with FlopCounterMode(display=False) as counter:  # it does not know oneDNN's for one
                model.residual_net(*two)
            flops, limit = counter.get_total_flops() / 2, matrix_rate()
            share = flops / times["residual net"] * 1e3 / limit
            print(f"  residual net: {flops / 1e9:.2f} GFLOP at {share:.0%} of a matrix product")


if __name__ == "__main__":
    main()
