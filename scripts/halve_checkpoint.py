"""Keep a part of a checkpoint in half precision: half the bytes, 2**-11 of each weight.

    python scripts/halve_checkpoint.py CHECKPOINT PART

PART is an attribute of the model, such as `net` or `residual_net.net`. What that does to errors is
to be measured afterwards; provenance says that it was done.
"""

from __future__ import annotations

import sys
from operator import attrgetter

from densitykit.models import load_model, save_model
from densitykit.models.checkpoint import read_arguments, read_provenance


def main() -> None:
    path, part = sys.argv[1:]
    model = load_model(path)
    attrgetter(part)(model).half()
    told = {"half_precision": f"{part}, rounded by scripts/halve_checkpoint.py"}
    print(save_model(model, path, read_arguments(path), {**read_provenance(path), **told}))


if __name__ == "__main__":
    main()
