"""Convert weights between PyTorch and Flax, with a proof that nothing was lost or mixed up."""

from bridge.weights.architectures import ARCHITECTURES as ARCHITECTURES
from bridge.weights.checkpoint import convert_checkpoint as convert_checkpoint
from bridge.weights.convert import Converted as Converted
from bridge.weights.convert import to_flax as to_flax
from bridge.weights.convert import to_torch as to_torch
from bridge.weights.layouts import KINDS as KINDS
from bridge.weights.manifest import WeightsManifest as WeightsManifest
from bridge.weights.mismatch import WeightsMismatch as WeightsMismatch
from bridge.weights.orbax_ import read_orbax as read_orbax
from bridge.weights.orbax_ import write_orbax as write_orbax
from bridge.weights.read import load_weights as load_weights
from bridge.weights.rules import Rule as Rule
from bridge.weights.safetensors_ import read_safetensors as read_safetensors
from bridge.weights.safetensors_ import write_safetensors as write_safetensors
