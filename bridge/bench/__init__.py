"""`jaxdw bench`: time jaxdw against PyTorch, lax and Flax. Results are checked first, then all ways take turns."""
