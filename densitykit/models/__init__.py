"""Emulators, their baselines and their checkpoints."""

from densitykit.models.autoencoder import Autoencoder
from densitykit.models.base import Domain, Emulator, FieldEmulator
from densitykit.models.baselines import baselines
from densitykit.models.checkpoint import load_model, read_provenance, save_model
from densitykit.models.diffusion import LatentDiffusion
from densitykit.models.nuclear.emulator import NuclearEmulator
from densitykit.models.unet import SurrogateUNet

__all__ = [
    "Autoencoder",
    "Domain",
    "Emulator",
    "FieldEmulator",
    "LatentDiffusion",
    "NuclearEmulator",
    "SurrogateUNet",
    "baselines",
    "load_model",
    "read_provenance",
    "save_model",
]
