"""The compiled kernels of jaxdw as operations of PyTorch: the same bits in both frameworks, forward and backward.

docs/arithmetic.md states each sum. The operations run on CPU tensors, under autograd and `torch.compile` too.
"""

from bridge.torch_ops._arithmetic import jaxdw_arithmetic as jaxdw_arithmetic
from bridge.torch_ops._depthwise import depthwise_conv as depthwise_conv
from bridge.torch_ops._elementwise import SGD as SGD
from bridge.torch_ops._elementwise import cross_entropy as cross_entropy
from bridge.torch_ops._norm import batch_norm as batch_norm
from bridge.torch_ops._products import conv as conv
from bridge.torch_ops._products import global_average_pool as global_average_pool
from bridge.torch_ops._products import linear as linear
from bridge.torch_ops._products import ordered_matmul as ordered_matmul
