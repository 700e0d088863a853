"""The function as the question's user wrote it, for the checker to run; no test is here."""

import torch
import torch.nn.functional as F


def depthwise_conv2d_matmul(input, weight, bias=None, stride=1, padding=0, dilation=1):
    N, C, H, W = input.shape
    assert H == W, "square inputs only"
    assert isinstance(stride, int) and isinstance(padding, int) and isinstance(dilation, int)
    k = weight.shape[-1]
    out = (H + 2 * padding - dilation * (k - 1) - 1) // stride + 1
    outputs = []
    for c in range(C):
        columns = F.unfold(input[:, c : c + 1], k, dilation=dilation, padding=padding, stride=stride)  # (N, k*k, L)
        outputs.append(torch.matmul(weight[c].reshape(1, k * k), columns))
    y = torch.cat(outputs, dim=1)
    if bias is not None:
        y = y + bias.reshape(1, C, 1)
    return y.reshape(N, C, out, out)
