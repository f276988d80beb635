"""Give checkpoints of before the windows what they now say about their training data.

    python scripts/convert_checkpoints.py DATA CHECKPOINT...

Models on the grid need the time between frames, the vectors between grid points and the species
that they were trained on (`densitykit.models.base.Domain`); they are read from the training split
of the store. Weights stay as they are, bit for bit; one that says it already is left alone.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from densitykit.data.windows import Windows
from densitykit.io.reader import open_split
from densitykit.models.base import Domain

FIELDS = ("LatentDiffusion", "SurrogateUNet")


def convert_fields(arguments: dict, windows: Windows) -> dict:
    """Return the arguments of a model on the grid with its domain."""
    return {"domain": json.loads(json.dumps(asdict(Domain.of(windows)))), **arguments}


def main() -> None:
    data, *checkpoints = sys.argv[1:]
    for path in checkpoints:
        card_path = Path(path).with_suffix(".json")
        card = json.loads(card_path.read_text())
        arguments = card["arguments"]
        if card["model"] in FIELDS and "domain" not in arguments:
            windows = Windows(open_split(data, "train"), arguments["horizon"])
            card["arguments"] = convert_fields(arguments, windows)
            card_path.write_text(json.dumps(card, indent=2) + "\n")
            print(card_path)


if __name__ == "__main__":
    main()
