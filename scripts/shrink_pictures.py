"""Pack the pictures in notebooks tighter: python scripts/shrink_pictures.py NOTEBOOK [MORE ...]

Beside each figure that moves, a notebook keeps a JPEG for sites that do not draw it. The browser
packs these for print; on a screen a third of the bytes looks the same.
"""

from __future__ import annotations

import base64
import json
import sys
from io import BytesIO
from pathlib import Path

from PIL import Image

QUALITY = 60


def packed(picture: str) -> str:
    """A JPEG in base64, packed again; the same where that would not make it smaller."""
    file = BytesIO()
    Image.open(BytesIO(base64.b64decode(picture))).save(file, "jpeg", quality=QUALITY)
    smaller = base64.b64encode(file.getvalue()).decode()
    return smaller if len(smaller) < 0.9 * len(picture) else picture


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        notebook = json.loads(path.read_text())
        for cell in notebook["cells"]:
            for output in cell.get("outputs", ()):
                data = output.get("data", {})
                if "image/jpeg" in data:
                    data["image/jpeg"] = packed(data["image/jpeg"])
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
