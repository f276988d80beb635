"""Checkpoints: weights as safetensors, constructor arguments and provenance as JSON.

``save_model(model, "li.safetensors")`` writes ``li.safetensors`` and ``li.json``. Neither can
execute code when it is loaded: the class is looked up by name among the models of this package.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from densitykit import __version__
from densitykit.errors import CheckpointError

__all__ = [
    "MODELS",
    "load_model",
    "read_arguments",
    "read_provenance",
    "save_model",
]

#: class name -> module; only these are ever imported, and only when they are asked for
MODELS = {
    "DeepDensity1D": "densitykit.chain.deep_density",
    "LatentDiffusion": "densitykit.models.diffusion",
    "LinearDensity": "densitykit.models.deep_density.linear",
    "NuclearEmulator": "densitykit.models.nuclear.emulator",
    "SmoothDensity1D": "densitykit.chain.smooth_density",
    "SurrogateUNet": "densitykit.models.unet",
}


def _model_class(name: str) -> type[nn.Module]:
    return getattr(import_module(MODELS[name]), name)


def save_model(
    model: nn.Module,
    path: str | Path,
    arguments: Mapping[str, Any],
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write weights and their JSON card, each by an atomic rename.

    Parameters
    ----------
    model
        An instance of one of :data:`MODELS`.
    path
        File name; its suffix becomes ``.safetensors``.
    arguments
        The keyword arguments that the model was constructed with.
    provenance
        How it was made (data, command, steps, seed, errors), kept as it is.

    Returns
    -------
    Path
        The path of the weights.

    Raises
    ------
    CheckpointError
        If the class of ``model`` is not in :data:`MODELS`.
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

    Raises
    ------
    CheckpointError
        Naming the file, what is wrong with it and what to do.
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
        model = _model_class(card["model"])(**card["arguments"])
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
