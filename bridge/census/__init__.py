"""Every depthwise convolution of a PyTorch model, captured as it runs, with a verdict each."""

from bridge.census.census import DEFAULT as DEFAULT
from bridge.census.census import LayerDiagnosis as LayerDiagnosis
from bridge.census.census import census as census
