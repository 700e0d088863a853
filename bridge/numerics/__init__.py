"""Formats, ULP, correctly rounded references and rigorous bounds of sums of products. NumPy only."""

from bridge.numerics._exact import ExactSum, exact_sum
from bridge.numerics.bounds import Arithmetic, difference_bound, error_bound
from bridge.numerics.convolution import (
    bias_gradient_products,
    exact,
    exact_bias_gradient,
    exact_input_gradient,
    exact_kernel_gradient,
    input_gradient_products,
    kernel_gradient_products,
    output_products,
)
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
from bridge.numerics.products import Products
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
    "round_integer",
    "round_to",
    "same_bits",
    "truncate_to",
    "ulp_distance",
]
