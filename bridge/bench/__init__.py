"""jaxdw against PyTorch and JAX's own, timed: `jaxdw bench`. Results are checked first, then all ways take turns."""
