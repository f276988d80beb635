"""Checkpoints: weights as safetensors, constructor arguments and provenance as JSON.

``save_model(model, "li.safetensors")`` writes ``li.safetensors`` and ``li.json``. Neither can
execute code when it is loaded: the class is looked up by name among the models of this package.
The state of an unfinished training is one file, tensors with what they belong to.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor, nn

from densitykit import __version__
from densitykit.errors import CheckpointError
from densitykit.models.deep_density import DeepDensity1D
from densitykit.models.diffusion import LatentDiffusion
from densitykit.models.nuclear import NuclearEmulator
from densitykit.models.smooth_density import SmoothDensity1D
from densitykit.models.surrogate import SurrogateUNet

__all__ = [
    "MODELS",
    "load_model",
    "load_state",
    "read_arguments",
    "read_provenance",
    "save_model",
    "save_state",
]

MODELS: dict[str, type[nn.Module]] = {
    m.__name__: m
    for m in (DeepDensity1D, LatentDiffusion, NuclearEmulator, SmoothDensity1D, SurrogateUNet)
}


def save_model(
    model: nn.Module,
    path: str | Path,
    arguments: Mapping[str, Any],
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write weights and their JSON card, each by an atomic rename.

    Arguments:
        model: an instance of one of :data:`MODELS`.
        path: file name; its suffix becomes ``.safetensors``.
        arguments: the keyword arguments that the model was constructed with.
        provenance: how it was made (data, command, steps, seed, errors), kept as it is.

    Returns:
        The path of the weights.

    Raises:
        CheckpointError: if the class of ``model`` is not in :data:`MODELS`.
    """
    if type(model).__name__ not in MODELS:
        raise CheckpointError(
            f"{path}: cannot save a {type(model).__name__}; known: {sorted(MODELS)}"
        )
    weights = _beside(path, ".safetensors")
    weights.parent.mkdir(parents=True, exist_ok=True)
    card = {
        "model": type(model).__name__,
        "arguments": dict(arguments),
        "densitykit": __version__,
        "provenance": dict(provenance or {}),
    }
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    content = save(tensors)
    card["sha256"] = hashlib.sha256(content).hexdigest()
    text = json.dumps(card, indent=2) + "\n"
    for target, data in ((weights, content), (_beside(path, ".json"), text.encode())):
        part = target.with_name(target.name + ".part")
        part.write_bytes(data)
        os.replace(part, target)
    return weights


def load_model(path: str | Path) -> nn.Module:
    """The model of a checkpoint, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: naming the file, what is wrong with it and what to do.
    """
    weights = _beside(path, ".safetensors")
    card = _read_card(_beside(path, ".json"))
    try:
        content = weights.read_bytes()
        tensors = load(content)
    except FileNotFoundError:
        raise CheckpointError(
            f"{weights}: weights not found beside their card; restore the file"
        ) from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{weights}: not a whole safetensors file ({error}); copy it again"
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    if card.get("sha256", digest) != digest:
        raise CheckpointError(
            f"{weights}: not the weights that its card describes (sha256 {digest[:12]}...); "
            "use a card and weights of one training"
        )
    try:
        model = MODELS[card["model"]](**card["arguments"])
        model.load_state_dict(tensors)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{weights}: weights and card disagree ({error}); "
            "use a card and weights of one training"
        ) from error
    return model.eval()


def read_arguments(path: str | Path) -> dict[str, Any]:
    """What the model of a checkpoint was constructed with: the ``arguments`` of its card."""
    return _read_card(_beside(path, ".json"))["arguments"]


def read_provenance(path: str | Path) -> dict[str, Any]:
    """How a checkpoint was made: the ``provenance`` of its card."""
    return _read_card(_beside(path, ".json"))["provenance"]


def _beside(path: str | Path, suffix: str) -> Path:
    """File of a checkpoint with this suffix; a name like "horizon-12.5" has none to replace."""
    path = Path(path)
    stem = path.name.removesuffix(".safetensors").removesuffix(".json")
    return path.with_name(stem + suffix)


def _read_card(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: card not found; a checkpoint is .safetensors + .json"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); restore the card") from error
    if not isinstance(card, dict):
        raise CheckpointError(f"{path}: not a JSON object; restore the card")
    for field in ("model", "arguments", "provenance"):
        if field not in card:
            raise CheckpointError(f"{path}: field '{field}' is missing; restore the card")
    if card["model"] not in list(MODELS):
        raise CheckpointError(
            f"{path}: field 'model' is '{card['model']}'; known: {sorted(MODELS)}"
        )
    return card


def save_state(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    step: int,
    settings: Mapping[str, Any],
    rows: list[dict[str, float]],
) -> None:
    """Replace the state of a training in one piece.

    Arguments:
        path: of the file; its folder is made if need be.
        tensors: all that the training remembers.
        step: steps done.
        settings: what must be the same when it is continued.
        rows: of its log so far.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = {"step": str(step), "settings": json.dumps(settings), "rows": json.dumps(rows)}
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    save_file(tensors, f"{path}.part", metadata=meta)
    os.replace(f"{path}.part", path)


def load_state(
    path: Path, settings: Mapping[str, Any]
) -> tuple[dict[str, Tensor], int, list[dict[str, float]]]:
    """Tensors, step and rows of `save_state`.

    Raises:
        CheckpointError: the file is broken, no state, or one of a training with other settings.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata()
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: not a whole training state ({error}); delete it"
        ) from error
    if meta is None or not {"step", "settings", "rows"} <= meta.keys():
        raise CheckpointError(f"{path}: not a training state; use another run directory")
    if json.loads(meta["settings"]) != settings:
        raise CheckpointError(
            f"{path}: made with settings {meta['settings']}, not {json.dumps(settings)}; "
            "use these settings or another run directory"
        )
    return tensors, int(meta["step"]), json.loads(meta["rows"])
