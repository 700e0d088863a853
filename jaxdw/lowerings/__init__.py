"""Programs for the sum over the taps and for its kernel's gradient, which `jaxdw.primitive` chooses between."""
