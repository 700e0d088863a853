"""PRECISION: a lower precision of inputs, output or accumulator, quantised inputs, or an emulated platform."""
