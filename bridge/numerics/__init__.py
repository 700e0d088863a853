"""Formats, ULP, correctly rounded references and rigorous bounds. NumPy only."""

from bridge.numerics._exact import (
    ExactSum,
    exact,
    exact_bias_gradient,
    exact_input_gradient,
    exact_kernel_gradient,
    exact_sum,
)
from bridge.numerics.bounds import Arithmetic, difference_bound, error_bound, probabilistic_bound
from bridge.numerics.formats import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    TF32,
    Format,
    cast,
    format_of,
    round_integer,
    round_to,
    truncate_to,
)
from bridge.numerics.products import (
    Products,
    bias_gradient_products,
    input_gradient_products,
    kernel_gradient_products,
    output_products,
)
from bridge.numerics.ulp import ordered, same_bits, ulp_distance

__all__ = [
    "BFLOAT16",
    "FLOAT16",
    "FLOAT32",
    "FLOAT64",
    "TF32",
    "Arithmetic",
    "ExactSum",
    "Format",
    "Products",
    "bias_gradient_products",
    "cast",
    "difference_bound",
    "error_bound",
    "exact",
    "exact_bias_gradient",
    "exact_input_gradient",
    "exact_kernel_gradient",
    "exact_sum",
    "format_of",
    "input_gradient_products",
    "kernel_gradient_products",
    "ordered",
    "output_products",
    "probabilistic_bound",
    "round_integer",
    "round_to",
    "same_bits",
    "truncate_to",
    "ulp_distance",
]
