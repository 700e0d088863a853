"""Whole models compared: every operation by itself, and how differences grow from layer to layer."""

from bridge.model.parity import LayerParity as LayerParity
from bridge.model.parity import Logits as Logits
from bridge.model.parity import ModelParity as ModelParity
from bridge.model.port_parity import model_parity as model_parity
from bridge.model.same_bits import same_bits_parity as same_bits_parity
