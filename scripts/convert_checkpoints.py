"""Bring older checkpoints into the form of today.

    python scripts/convert_checkpoints.py DATA CHECKPOINT...

Emulators need the time between frames, the vectors between grid points and the species that they
were trained on (`densitykit.models.base.Domain`). Those on the grid read them from the training
split of the store, and their weights stay as they are. The nuclear emulator has them in its
arguments; its form factors get an axis for the species. A checkpoint that says all this already
is left alone. Maps from atoms to density keep the axes of their products in single precision.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from densitykit.data.windows import Windows
from densitykit.io.reader import open_split
from densitykit.models.base import Domain
from densitykit.models.checkpoint import _digest

FIELDS = ("LatentDiffusion", "SurrogateUNet")


def convert_fields(arguments: dict, windows: Windows) -> dict:
    """Return the arguments of a model on the grid with its domain."""
    return {"domain": json.loads(json.dumps(asdict(Domain.of(windows)))), **arguments}


def convert_nuclear(arguments: dict, tensors: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Return arguments and weights of a nuclear emulator of one species, which was lithium.

    What were defaults of the class becomes part of the card.
    """
    old = {"temperature": 800.0, "relaxation": 300.0, "substeps": 2} | arguments
    spacing, time_step = old.pop("spacing"), old.pop("frame_spacing")
    voxel = [[spacing * (i == j) for j in range(3)] for i in range(3)]
    domain = {"time_step": time_step, "voxel": voxel, "species": [3]}
    weights = tensors["superposition.weights"][None].clone()
    return {"domain": domain, **old}, tensors | {"superposition.weights": weights}


def convert_map(weights: Path) -> None:
    """Round the axes of the products of a map, whose card is within the file."""
    with safe_open(weights, "pt") as file:
        card = file.metadata()["card"]
    tensors = load_file(weights)
    tensors |= {k: x.float() for k, x in tensors.items() if ".pairs_" in k}
    weights.write_bytes(save(tensors, {"card": card, "sha256": _digest(card, save(tensors))}))


def main() -> None:
    data, *checkpoints = sys.argv[1:]
    for path in checkpoints:
        card_path, weights_path = (Path(path).with_suffix(s) for s in (".json", ".safetensors"))
        card = json.loads(card_path.read_text())
        arguments = card["arguments"]
        if any(
            ".pairs_" in k and x.dtype is torch.float64 for k, x in load_file(weights_path).items()
        ):
            convert_map(weights_path)
            print(weights_path)
        if "domain" in arguments:
            continue
        if card["model"] in FIELDS:
            windows = Windows(open_split(data, "train"), arguments["horizon"])
            card["arguments"] = convert_fields(arguments, windows)
        elif card["model"] == "NuclearEmulator":
            card["arguments"], tensors = convert_nuclear(arguments, load_file(weights_path))
            content = save(tensors)
            card["sha256"] = hashlib.sha256(content).hexdigest()
            weights_path.write_bytes(content)
        else:
            continue
        card_path.write_text(json.dumps(card, indent=2) + "\n")
        print(card_path)


if __name__ == "__main__":
    main()
