"""Every depthwise convolution of a PyTorch model, captured as it runs, with one verdict each."""
