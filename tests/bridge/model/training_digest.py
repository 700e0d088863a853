"""Two steps of training in PyTorch by the compiled kernels: prints the SHA-256 of all that they change."""

import hashlib

import numpy as np
import torch

from bridge import torch_ops
from tests.references import torchvision

WIDTH, CLASSES, STEPS = 0.25, 5, 2


def network():
    """MobileNetV2 whose parameters are whole numbers over powers of two: no library of random numbers changes them."""
    rng = np.random.default_rng(20261128)
    module = torchvision().models.mobilenet_v2(num_classes=CLASSES, width_mult=WIDTH, dropout=0.0).train()
    for name, tensor in module.state_dict().items():
        if tensor.dtype == torch.float32 and "running" not in name:
            fan = max(1, tensor[0].numel()) if tensor.dim() > 1 else 4
            drawn = rng.integers(-1024, 1025, tuple(tensor.shape)) / 1024 / 2 ** (fan.bit_length() // 2)
            tensor.copy_(torch.from_numpy(drawn + (tensor.dim() == 1 and name.endswith("weight"))))
    return module


def batches():
    rng = np.random.default_rng(1)
    for _ in range(STEPS):
        yield rng.integers(-512, 513, (2, 32, 32, 3)).astype(np.float32) / 256, rng.integers(0, CLASSES, 2)


def trained(module):
    """Take the steps, and return the optimizer."""
    optimizer = torch_ops.SGD(module.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    for images, labels in batches():
        optimizer.zero_grad()
        with torch_ops.jaxdw_arithmetic():
            logits = module(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
            loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
        loss.backward()
        optimizer.step()
    return optimizer


def digest():
    module, found = network(), hashlib.sha256()
    optimizer = trained(module)
    momenta = [optimizer.state[parameter]["momentum_buffer"] for parameter in module.parameters()]
    for tensor in (*module.state_dict().values(), *momenta):
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    print(digest())
