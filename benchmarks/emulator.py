"""Where the time of the emulator with nuclei goes, and how fast it is beside ab-initio MD.

    python benchmarks/emulator.py [CHECKPOINT]

One CPU core. Prints milliseconds a step of each part, simulated femtoseconds a second, and the
ratio to ab-initio MD on one core (from the attributes of the trajectory), for 32 and 256 atoms:
everything in every step, also with the net in bfloat16 (twice as fast where the processor has
it); nuclei and superposition only; nuclei only, whose density is predicted when
somebody looks; and nuclei with one force evaluation a step instead of two, in double and in
single precision.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from densitykit.assess.cost import ab_initio_seconds, matrix_rate
from densitykit.data.windows import load_windows, step_generator
from densitykit.models import load_model
from densitykit.models.nuclear.emulator import (
    NuclearEmulator,
    NuclearState,
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


def parts(model: NuclearEmulator, state: NuclearState) -> dict[str, float]:
    """Milliseconds of each part of a step."""
    shape, x = tuple(state.base.shape[1:]), state.positions
    cell, numbers = state.cell, state.numbers
    fast, single = load_model(CHECKPOINT), load_model(CHECKPOINT)
    fast.substeps = single.substeps = 1
    single.force_field.float()
    generator = step_generator(0, 0)

    def step() -> Tensor:
        return model.density(model.step(state, generator))

    return {
        "force": milliseconds(lambda: model.force_field.forces(x, cell, numbers)),
        "nuclei": milliseconds(lambda: model.move(state, generator)),
        "nuclei, one force": milliseconds(lambda: fast.move(state, generator)),
        "nuclei, one force, single": milliseconds(lambda: single.move(state, generator)),
        "superposition": milliseconds(lambda: model.superposition(x, cell, shape, numbers)),
        "residual net": milliseconds(
            lambda: model.residual_net(state.base, state.base, state.residual), 5
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
    model = load_model(CHECKPOINT)
    test = load_windows(DATA, "test", model.horizon)
    ab_initio = 1 / ab_initio_seconds(test.attrs)
    print(f"ab-initio MD, 32 atoms: {ab_initio:.2f} fs of liquid a second, one core")
    small, numbers = model.init(test[0]), test.numbers.repeat(8)
    x = supercell(small.positions, test.cell.numpy())
    v = thermal_velocities(x, model.masses(numbers), model.temperature, step_generator(0, 1))
    large = model.init_at(x, v, 2 * test.cell, (48, 48, 48), numbers)
    states = {"32": small, "256": large, "32 x 16": model.init(test[0].expand(16))}
    for name, state in states.items():
        times = parts(model, state)
        times["nuclei and superposition"] = times["nuclei"] + times["superposition"]
        print(f"\n{name} atoms{' members' if 'x' in name else ''}")
        for part, ms in times.items():
            line = f"  {part:<26}{ms:>9.2f} ms"
            if part.startswith(("nuclei", "everything")):
                rate = len(state.positions) * model.horizon / ms * 1e3
                line += f"{rate:>10.0f} fs/s"
                line += f"{rate / ab_initio:>8.0f} x ab initio" if name != "256" else ""
            print(line)
        if name == "32":
            two = [torch.cat([x, x]) for x in (state.base, state.base, state.residual)]
            with FlopCounterMode(display=False) as counter:  # it does not know oneDNN's for one
                model.residual_net(*two)
            flops, limit = counter.get_total_flops() / 2, matrix_rate()
            share = flops / times["residual net"] * 1e3 / limit
            print(f"  residual net: {flops / 1e9:.2f} GFLOP at {share:.0%} of a matrix product")


if __name__ == "__main__":
    main()
