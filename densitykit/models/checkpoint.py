"""Checkpoints: one safetensors file with weights, constructor arguments and provenance.

``save_model(model, "li.safetensors")`` writes ``li.safetensors``, in one piece: the card (JSON:
class, arguments, provenance) and a digest of card and weights are in its header, so that a kill
leaves the old checkpoint or the new one. ``li.json`` beside it is a copy of the card for reading.
Checkpoints of before have their card only there, with a digest of the weights; they load as ever.

Nothing that is loaded can execute code: the class is looked up by name among the models of this
package, or is the one that the caller hands over. Before a model is built its card is checked for
types and sizes, and the weights for names, shapes and values.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from densitykit import __version__
from densitykit.errors import CheckpointError
from densitykit.io.store import fresh, replacing

__all__ = [
    "MODELS",
    "import_emulator",
    "load_model",
    "read_arguments",
    "read_provenance",
    "save_model",
]

#: class name -> module; only these are ever imported, and only when they are asked for
MODELS = {
    "DeepDensity": "densitykit.models.deep_density.network",
    "DeepDensity1D": "densitykit.chain.deep_density",
    "LatentDiffusion": "densitykit.models.diffusion",
    "LinearDensity": "densitykit.models.deep_density.linear",
    "NuclearEmulator": "densitykit.models.nuclear.emulator",
    "SmoothDensity1D": "densitykit.chain.smooth_density",
    "SurrogateUNet": "densitykit.models.unet",
}
#: largest numbers in a card: what is built in loops is bounded apart, the rest by the weights
_LIMITS = {"blocks": 100, "autoencoder_blocks": 100, "layers": 100, "species": 118, "counts": 100}
_LIMITS |= {"radial": 32, "degree": 8, "pair": 1000, "n_near": 16, "spans": 16, "l_max": 16}
_LIMITS |= {"sampler_steps": 1000, "substeps": 1000, "patch": 16, "count": 100}
_LARGEST = 10**6


def _model_class(name: str) -> type[nn.Module]:
    return getattr(import_module(MODELS[name]), name)


def save_model(
    model: nn.Module,
    path: str | Path,
    arguments: Mapping[str, Any],
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write weights and card to one file, in one piece, and a copy of the card beside it.

    Parameters
    ----------
    model
        An instance of one of :data:`MODELS`, or of a class of your own. Parts of it may be in half
        precision (``model.net.half()``); they are loaded as they were made.
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
    """
    weights = _beside(path, ".safetensors")
    weights.parent.mkdir(parents=True, exist_ok=True)
    card = {
        "model": type(model).__name__,
        "arguments": dict(arguments),
        "densitykit": __version__,
        "provenance": dict(provenance or {}),
    }
    text = json.dumps(card, indent=2) + "\n"
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    digest = _digest(text, save(tensors))
    content = save(tensors, {"card": text, "sha256": digest})
    for target, data in ((weights, content), (_beside(path, ".json"), text.encode())):
        with replacing(target) as file:
            file.write(data)
    return weights


def check_target(path: str | Path) -> None:
    """Raise `OSError` or `CheckpointError`, before a training, where none can be written."""
    weights = _beside(path, ".safetensors")
    weights.parent.mkdir(parents=True, exist_ok=True)
    probe = fresh(weights, "partial")
    probe.touch()
    probe.unlink()


def load_model(path: str | Path, kind: type[nn.Module] | None = None) -> nn.Module:
    """The model of a checkpoint, in evaluation mode, on the CPU.

    Parameters
    ----------
    path
        File name, with or without its suffix.
    kind
        The class of a model of your own, which no name in a file can call for.

    Raises
    ------
    CheckpointError
        Naming the file, what is wrong with it and what to do.
    """
    weights = _beside(path, ".safetensors")
    text, header = _card_text(path)
    card = _parsed(text, weights if header else _beside(path, ".json"), kind)
    try:
        content = weights.read_bytes()
        tensors = load(content)
    except FileNotFoundError:
        raise CheckpointError(
            f"{weights}: weights not found beside their card; restore the file"
        ) from None
    except SafetensorError as error:
        raise _not_whole(weights, error) from error
    found = _digest(text, content) if header else hashlib.sha256(content).hexdigest()
    if (header or card).get("sha256", found) != found:
        raise CheckpointError(
            f"{weights}: not the weights that its card describes (sha256 {found[:12]}...); "
            "copy the checkpoint again, or use a card and weights of one training"
        )
    if header and _beside(path, ".json").exists() and _text(_beside(path, ".json")) != text:
        told = "not the card of the weights beside it, which have their own"
        warnings.warn(f"{_beside(path, '.json')}: {told}", stacklevel=2)
    return _built(kind or _model_class(card["model"]), card, tensors, weights)


def _built(
    kind: type[nn.Module], card: Mapping[str, Any], tensors: Mapping[str, Tensor], file: Path
) -> nn.Module:
    """The model of a card with these weights; it is built only where they fit."""
    try:
        _check_types(kind, card["arguments"])
        with torch.device("meta"):  # takes no memory, however large
            expected = kind(**card["arguments"]).state_dict()
        _check_weights(tensors, expected)
        model = kind(**card["arguments"])
        model.load_state_dict(tensors)
    except Exception as error:  # whatever arguments a card may hold, and a constructor may raise
        raise CheckpointError(
            f"{file}: weights and card disagree, field 'arguments' or a tensor: "
            f"{_one_line(error)}; use a card and weights of one training"
        ) from error
    return model.eval()


def _check_types(kind: type[nn.Module], arguments: Mapping[str, Any]) -> None:
    """Raise `ValueError` where an argument has not the type that the constructor declares."""
    hints = get_type_hints(kind.__init__)
    for name, value in arguments.items():
        if name in hints and not _fits(value, hints[name]):
            raise ValueError(f"'{name}' is {_short(value)}, not of type {hints[name]}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON can stand for a type."""
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin is UnionType:
        return any(_fits(value, one) for one in inner)
    if origin is tuple or origin is Sequence:
        return isinstance(value, list) and all(_fits(v, inner[0]) for v in value)
    if origin is Mapping:
        return isinstance(value, dict) and all(_fits(v, inner[1]) for v in value.values())
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return hint is Any or isinstance(value, hint)


def _check_weights(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` for the first tensor that is missing, of another shape, or not finite."""
    for name in sorted(tensors.keys() | expected.keys()):
        found, wanted = tensors.get(name), expected.get(name)
        if found is None or wanted is None:
            raise ValueError(f"tensor {name!r} is {'missing' if found is None else 'unknown'}")
        half = torch.float16 if wanted.is_floating_point() else None  # saved so to be smaller
        if found.shape != wanted.shape or found.dtype not in (wanted.dtype, half):
            pair = (f"{x.dtype} {tuple(x.shape)}" for x in (found, wanted))
            raise ValueError("tensor {!r} is {}, not {}".format(name, *pair))
        if not torch.isfinite(found).all():
            raise ValueError(f"tensor {name!r} has values that are not finite")


def import_emulator(name: str) -> Any:
    """What `module:attribute` makes when it is called; it runs code of yours, which you name.

    Raises
    ------
    CheckpointError
        It cannot be imported, or fails.
    """
    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        return getattr(import_module(module), attribute)()
    except Exception as error:  # it is anything
        raise CheckpointError(
            f"emulator {name!r}: {type(error).__name__}: {_one_line(error)}; give "
            "module:name of a class or a function that makes one without arguments"
        ) from error


def read_arguments(path: str | Path) -> dict[str, Any]:
    """What the model of a checkpoint was constructed with: the ``arguments`` of its card."""
    return _card(path)["arguments"]


def read_provenance(path: str | Path) -> dict[str, Any]:
    """How a checkpoint was made: the ``provenance`` of its card."""
    return _card(path)["provenance"]


def _beside(path: str | Path, suffix: str) -> Path:
    """File of a checkpoint with this suffix; a name like "horizon-12.5" has none to replace."""
    path = Path(path)
    stem = path.name.removesuffix(".safetensors").removesuffix(".json")
    if not stem:
        raise CheckpointError(f"{path}: no name of a checkpoint; give one, such as li.safetensors")
    return path.with_name(stem + suffix)


def _digest(text: str, content: bytes) -> str:
    """Of a card and of the tensors in a safetensors file, whose header is left out."""
    data = content[8 + int.from_bytes(content[:8], "little") :]
    return hashlib.sha256(text.encode() + data).hexdigest()


def _card(path: str | Path) -> dict[str, Any]:
    text, header = _card_text(path)
    return _parsed(text, _beside(path, ".safetensors" if header else ".json"))


def _card_text(path: str | Path) -> tuple[str, dict[str, str]]:
    """The card and the header it stands in; of an older checkpoint the JSON file, and nothing."""
    weights = _beside(path, ".safetensors")
    try:
        with safe_open(weights, framework="pt") as file:
            header = file.metadata() or {}
    except FileNotFoundError:
        header = {}
    except SafetensorError as error:
        raise _not_whole(weights, error) from error
    if {"card", "sha256"} <= header.keys():
        return header["card"], header
    return _text(_beside(path, ".json")), {}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: card not found; give a checkpoint, .safetensors with a card inside or beside"
        ) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); restore the card") from error


def _parsed(text: str, file: Path, kind: type[nn.Module] | None = None) -> dict[str, Any]:
    """The card of a text, with the fields and numbers that one may have."""
    try:
        card = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: card: not JSON ({error}); restore the card") from error
    if not isinstance(card, dict):
        raise CheckpointError(f"{file}: card: not a JSON object; restore the card")
    for field, what in (("model", str), ("arguments", dict), ("provenance", dict)):
        if not isinstance(card.get(field), what):
            told = f"field '{field}' is missing, or no {what.__name__}; restore the card"
            raise CheckpointError(f"{file}: card: {told}")
    known = sorted(MODELS) if kind is None else [kind.__name__]
    if card["model"] not in known:
        raise CheckpointError(
            f"{file}: field 'model' is {_short(card['model'])}; known: {known}; a class of your "
            "own is to be handed over, load_model(path, YourModel)"
        )
    _check_sizes(card["arguments"], "arguments", file)
    return card


def _check_sizes(value: Any, name: str, file: Path) -> None:
    """Bound what a model is built of, before it is: numbers and lengths of lists."""
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else ((name, v) for v in value)
        if len(value) > 1000:
            problem = f"{len(value)} values, more than 1000"
            raise CheckpointError(f"{file}: field {name!r}: {problem}; restore the card")
        for key, part in inner:
            _check_sizes(part, key, file)
    elif isinstance(value, int | float):
        largest = _LIMITS.get(name, _LARGEST)
        if not -largest <= value <= largest:  # nor a NaN
            problem = f"{_short(value)} is not within +-{largest}"
            raise CheckpointError(f"{file}: field {name!r}: {problem}; restore the card")


def _not_whole(file: Path, error: Exception) -> CheckpointError:
    told = f"not a whole safetensors file ({_one_line(error)}); copy it again"
    return CheckpointError(f"{file}: {told}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
