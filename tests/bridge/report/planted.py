"""Diagnoses to report, with and without planted causes; no test is here."""

import dataclasses

import numpy as np

import bridge
from bridge import Case, Diagnosis
from bridge.accumulation import AccumulationOrder, Fingerprint, Tree
from bridge.diagnosis import compare
from bridge.numerics import exact


def case(seed, shape=(2, 6, 7, 4), kernel_size=(3, 3), dtype=np.float32, **options) -> Case:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(dtype)
    kernel = rng.standard_normal((*kernel_size, 1, shape[-1])).astype(dtype)
    return Case(x, kernel, **({"padding": 1} | options))


def diagnosis_of(case: Case, outputs: dict[str, np.ndarray]) -> Diagnosis:
    """The diagnosis of given outputs, against each other and the exact result; nothing is run."""
    outputs = {**outputs, "numpy.exact": exact(case).value}
    names = list(outputs)
    pairs = [(a, b) for number, a in enumerate(names) for b in names[number + 1 :]]
    comparisons = [compare(outputs[a], outputs[b], case, names=(a, b)) for a, b in pairs]
    return Diagnosis(case, outputs, comparisons)


def rounding(seed, **options) -> Diagnosis:
    """One output has the exact bits, another differs in the last place in some."""
    asked = case(seed, **options)
    y = exact(asked).value
    up = np.random.default_rng(seed).random(y.shape) < 0.3
    return diagnosis_of(asked, {"same": y.copy(), "up": np.where(up, np.nextafter(y, y.dtype.type(np.inf)), y)})


def scaled_tap(seed) -> Diagnosis:
    """Tap (1, 2) of channel 3 is scaled by 1.01."""
    asked = case(seed)
    kernel = asked.kernel.copy()
    kernel[1, 2, 0, 3] *= np.float32(1.01)
    return diagnosis_of(asked, {"right": exact(asked).value, "wrong": exact(asked.replace(kernel=kernel)).value})


def one_sided_nan(seed) -> Diagnosis:
    asked = case(seed)
    y = exact(asked).value
    y[1, 2, 3, 1] = np.nan
    return diagnosis_of(asked, {"nan": y, "right": exact(asked).value})


def identical(seed) -> Diagnosis:
    asked = case(seed)
    return diagnosis_of(asked, {"one": exact(asked).value, "two": exact(asked).value})


def ordered(seed) -> Diagnosis:
    """`rounding` with planted orders: chains of rounded products, fused in "up", where one border element differs."""
    made = rounding(seed)
    shape = made.outputs["up"].shape
    orders = []
    for name, whole, border in (
        ("same", "((((0+1)+2)+3)+4)+5", "((1+2)+4)+5"),
        ("up", "F[5, F[4, F[3, F[2, F[1, 0]]]]]", "F[5, F[4, F[2, 1]]]"),
    ):
        trees = [Tree.parse(text) for text in (whole, border, "2+(4+5)")]
        labels = np.zeros(shape, np.int32)
        labels[:, :, 0] = 1
        labels[0, 0, 0, 0] = 2 if name == "up" else 1
        fingerprint = Fingerprint(None, None, None, None, None, (), None, None, None, True, 0, 0)
        found = (None, np.dtype(np.float32), tuple(trees), labels, (), np.zeros(shape, bool), fingerprint)
        orders.append(AccumulationOrder(name, *found))
    return dataclasses.replace(made, orders=orders)


def question(seed) -> Diagnosis:
    """The question's own case, run for real."""
    return bridge.parity(case(seed, shape=(2, 5, 5, 3)))


@dataclasses.dataclass(frozen=True)
class Shares:
    """An attribution as `to_html` takes it."""

    shares = (("algorithm", 3e-7), ("layout", -1e-7))
    unexplained = 5e-8
    total = 2.5e-7
    unit = "max |a - b|"


KINDS = {"rounding": rounding, "tap": scaled_tap, "nan": one_sided_nan, "identical": identical}
