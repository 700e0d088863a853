"""Programs for the sum over the taps and for its kernel's gradient; `jaxdw.methods` says which runs where."""
