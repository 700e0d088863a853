"""Compare MobileNet's depthwise convolution as unfold + matmul with F.conv2d, and show how to get the same bits.

python examples/question.py
"""

import numpy as np
import torch
import torch.nn.functional as F

import jaxdw

torch.manual_seed(0)
x = torch.randn(2, 3, 5, 5)  # batch, channels, height, width
weight = torch.randn(3, 1, 3, 3)

expected = F.conv2d(x, weight, padding=1, groups=3)

# Channel by channel: windows as columns, times the weights, folded back.
outputs = []
for c in range(3):
    columns = F.unfold(x[:, c : c + 1], kernel_size=3, padding=1)  # (2, 9, 25)
    outputs.append(F.fold(weight[c].reshape(1, 9) @ columns, (5, 5), 1))
unfolded = torch.cat(outputs, dim=1)
print(f"unfold + matmul: {(unfolded != expected).sum()} of {expected.numel()} elements differ,")
print(f"                 by at most {(unfolded - expected).abs().max():.1e}")

# In float64 both sums are almost exact, and nearly always round to the same float32. So the code is right, and the
# difference is rounding.
wide = F.conv2d(x.double(), weight.double(), padding=1, groups=3).float()
print(f"F.conv2d itself differs from the float64 result in {(wide != expected).sum()} elements")

# In JAX, channels last: the same windows, and the bits of F.conv2d.
image = x.permute(0, 2, 3, 1).numpy()
kernel = weight.permute(2, 3, 1, 0).numpy()
y = jaxdw.depthwise_conv(image, kernel, padding=1, method="taps")
same = np.asarray(y) == expected.permute(0, 2, 3, 1).numpy()
print(f"jaxdw, taps:     {(~same).sum()} of {same.size} elements differ")

# The windows themselves, for any other work on them.
windows = jaxdw.unfold(image, (3, 3), padding=1)
print(f"windows:         {windows.shape}  (batch, height, width, kernel height, kernel width, channels)")
