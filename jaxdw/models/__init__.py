"""MobileNet V1, V2 and V3 in Flax NNX, each equal to its PyTorch originals; `import jaxdw.models`."""

from jaxdw.models._mobilenet_v1 import mobilenet_v1 as mobilenet_v1
from jaxdw.models._mobilenet_v2 import mobilenet_v2 as mobilenet_v2
from jaxdw.models._mobilenet_v3 import mobilenet_v3_large as mobilenet_v3_large
from jaxdw.models._mobilenet_v3 import mobilenet_v3_small as mobilenet_v3_small
from jaxdw.models.arithmetic import Arithmetic as Arithmetic
from jaxdw.models.arithmetic import with_arithmetic as with_arithmetic
from jaxdw.models.blocks import Block as Block
from jaxdw.models.blocks import Conventions as Conventions
from jaxdw.models.mobilenet import Architecture as Architecture
from jaxdw.models.mobilenet import MobileNet as MobileNet
from jaxdw.models.sharding import shard_layers as shard_layers
