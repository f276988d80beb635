"""One-step maps of the density state and their checkpoints."""

from densitykit.chain.deep_density import DeepDensity1D
from densitykit.chain.smooth_density import SmoothDensity1D
from densitykit.models.autoencoder import Autoencoder
from densitykit.models.base import StateMap
from densitykit.models.checkpoint import load_model, load_nuclear, read_provenance, save_model
from densitykit.models.diffusion import LatentDiffusion
from densitykit.models.nuclear.emulator import NuclearEmulator
from densitykit.models.unet import SurrogateUNet

__all__ = [
    "Autoencoder",
    "DeepDensity1D",
    "LatentDiffusion",
    "NuclearEmulator",
    "SmoothDensity1D",
    "StateMap",
    "SurrogateUNet",
    "load_model",
    "load_nuclear",
    "read_provenance",
    "save_model",
]
