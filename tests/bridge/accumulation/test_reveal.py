"""Planted orders and arithmetics are revealed as what they are, and replayed bit for bit; what is no sum is refused."""

import ml_dtypes
import numpy as np
import pytest

from bridge.accumulation import BIAS, NotASum, Tree, replay, reveal
from bridge.case import Case
from bridge.numerics import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, TF32, exact
from tests.bridge.accumulation.planted import Planted, a_case, in_halves, in_lanes, random_tree, restricted


def bits(y):
    return np.ascontiguousarray(y).view(f"u{y.itemsize}")


def assert_explained(order, implementation, case):
    assert order.revealed == 1, order.refusals
    y = implementation.run(case)
    assert (bits(replay(order, case)) == bits(y)).all()


def interior(order, case):
    """The tree of the element in the middle."""
    return order.tree(tuple(n // 2 for n in case.geometry.output_shape))


ORDERS = {
    "a chain": Tree.chain(range(9)),
    "a fused chain": Tree.chain(range(9), fused=True),
    "a chain from the last tap": Tree.chain(range(8, -1, -1), fused=True),
    "in halves": in_halves(range(9)),
    "in three lanes": in_lanes(range(9), 3),
    "in four fused lanes": in_lanes(range(9), 4, fused=True),
    "in blocks": Tree.add(Tree.chain(range(5)), Tree.chain(range(5, 9))),
    "fused at odd taps only": Tree.parse("8+F[7, (6+F[5, (4+F[3, (2+F[1, 0])])])]"),
    "matrix units of four": Tree.parse("((0+1+2+3)+(4+5+6+7))+8"),
    "one wide addition": Tree.parse("0+1+2+3+4+5+6+7+8"),
}


@pytest.mark.parametrize("name", ORDERS)
def test_a_planted_order_is_revealed_at_every_border_and_replayed(name, seed):
    rng = np.random.default_rng(seed)
    case = a_case(rng, taps=(3, 3), spatial=(4, 5), padding=1)
    planted = Planted(ORDERS[name])
    order = reveal(planted, case)
    valid = case.geometry.valid_taps().reshape(4, 5, 9)
    for index in np.ndindex(*case.geometry.output_shape):
        assert order.tree(index) is restricted(ORDERS[name], np.flatnonzero(valid[index[1:3]]))
    assert_explained(order, planted, case)


@pytest.mark.parametrize("bias", ["first", "last", "inside"])
def test_the_place_of_the_bias_is_revealed(bias, seed):
    taps = {"first": [BIAS, 0, 1, 2, 3], "last": [0, 1, 2, 3, BIAS], "inside": [0, 1, BIAS, 2, 3]}[bias]
    case = a_case(np.random.default_rng(seed), taps=(4,), bias=True, padding="VALID")
    planted = Planted(Tree.chain(taps, fused=True))
    order = reveal(planted, case)
    assert order.trees == (planted.tree,)
    assert order.fingerprint.bias == bias
    assert_explained(order, planted, case)


def test_random_orders_are_revealed_and_replayed(seed, full):
    rng = np.random.default_rng(seed)
    for _ in range(400 if full else 25):
        taps = int(rng.integers(1, 16))
        bias = bool(rng.random() < 0.5)
        leaves = [*range(taps), *([BIAS] if bias else [])]
        planted = Planted(random_tree(rng, leaves))
        case = a_case(rng, taps=(taps,), spatial=(taps + 2,), channels=1, bias=bias, padding="VALID")
        order = reveal(planted, case)
        assert order.trees == (planted.tree,)
        assert_explained(order, planted, case)


def test_every_element_may_have_an_order_of_its_own(seed):
    rng = np.random.default_rng(seed)
    case = a_case(rng, taps=(5,), spatial=(8,), channels=3, padding="VALID")
    trees = {index: random_tree(rng, range(5)) for index in np.ndindex(*case.geometry.output_shape)}
    planted = Planted(Tree.chain(range(5)), trees=trees)
    order = reveal(planted, case)
    assert {index: order.tree(index) for index in trees} == trees
    assert_explained(order, planted, case)


DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
ARITHMETICS = [
    ("float64", FLOAT64, None),
    ("float32", FLOAT32, None),
    ("float32", FLOAT64, None),
    ("float32", BFLOAT16, None),
    ("float32", TF32, None),
    ("float32", FLOAT32, TF32),
    ("float32", FLOAT32, BFLOAT16),
    ("bfloat16", FLOAT32, None),
    ("bfloat16", BFLOAT16, None),
    ("float16", FLOAT32, None),
    ("float16", FLOAT16, None),
]


@pytest.mark.parametrize("fused", [False, True], ids=["rounded", "fused"])
@pytest.mark.parametrize(
    ("dtype", "accumulator", "inputs"), ARITHMETICS, ids=lambda part: getattr(part, "name", str(part))
)
def test_the_width_of_inputs_and_accumulator_is_revealed(dtype, accumulator, inputs, fused, seed):
    case = a_case(np.random.default_rng(seed), taps=(6,), bias=True, dtype=DTYPES[dtype], padding=[(2, 0)])
    planted = Planted(Tree.chain([*range(6), BIAS], fused=fused), accumulator, inputs)
    order = reveal(planted, case)
    measured = order.fingerprint
    assert measured.accumulator.format is accumulator
    assert not measured.accumulator.toward_zero
    assert measured.x.format is (inputs or measured.x.format)
    assert measured.kernel == measured.x
    holds = 2 * measured.x.format.precision <= accumulator.precision
    assert measured.products == ("exact" if holds else "fused" if fused else "rounded")
    expected = Tree.chain([*range(6), BIAS], fused=fused and not holds)
    assert interior(order, case) is expected
    assert_explained(order, planted, case)


def test_more_taps_than_a_run_can_count_are_counted_in_several(seed):
    case = a_case(np.random.default_rng(seed), taps=(70,), spatial=(71,), channels=1, dtype=np.float16, padding="VALID")
    planted = Planted(in_lanes(range(70), 8), flushes=True)
    order = reveal(planted, case)
    assert order.trees == (planted.tree,)
    assert_explained(order, planted, case)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_flushed_subnormals_are_revealed_and_replayed(dtype, seed):
    rng = np.random.default_rng(seed)
    case = a_case(rng, taps=(4,), bias=True, dtype=DTYPES[dtype], padding=1)
    tiny = DTYPES[dtype](2.0 ** (-1022 if dtype == "float64" else -126))
    small = case.replace(x=case.x * tiny, bias=case.bias * tiny)
    chain = Tree.chain([*range(4), BIAS])
    accumulator = FLOAT64 if dtype == "float64" else FLOAT32
    for planted in (Planted(chain, accumulator, flushes=True), Planted(chain, accumulator)):
        order = reveal(planted, case)
        assert order.fingerprint.flushed == (("x", "kernel", "output") if planted.flushes else ())
        assert (bits(replay(order, small)) == bits(planted.run(small))).all()


def numpy_convolution(terms):
    """An implementation from a function of the list of products and the bias."""

    def run(case):
        products = [x * w for x, w, _ in case.tap_terms()]
        bias = (
            [] if case.bias is None else [case.split_channels(np.broadcast_to(case.bias, case.geometry.output_shape))]
        )
        return (
            np.broadcast_to(terms(products + bias), case.split_channels(np.empty(case.geometry.output_shape)).shape)
            .reshape(case.geometry.output_shape)
            .astype(case.dtype)
        )

    return run


def chained(terms):
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def kahan(terms):
    total, lost = np.zeros_like(terms[0]), np.zeros_like(terms[0])
    for term in terms:
        term = term - lost
        new = total + term
        total, lost = new, (new - total) - term
    return total


def test_padding_is_revealed_as_skipped_or_multiplied(seed):
    case = a_case(np.random.default_rng(seed), padding=1)
    assert reveal(Planted(Tree.chain(range(3))), case).fingerprint.padding_taps == "skipped"
    multiplied = reveal(numpy_convolution(chained), case)
    assert multiplied.fingerprint.padding_taps == "multiplied"
    infinite = case.replace(kernel=np.where(np.arange(3)[:, None, None] == 0, np.float32(np.inf), case.kernel))
    with np.errstate(invalid="ignore"):
        assert np.array_equal(replay(multiplied, infinite), numpy_convolution(chained)(infinite), equal_nan=True)
    assert reveal(numpy_convolution(chained), case.replace(padding="VALID")).fingerprint.padding_taps is None


@pytest.mark.parametrize("zero_start", [False, True])
def test_a_sum_that_starts_from_zero_never_is_minus_zero(zero_start, seed):
    run = numpy_convolution(lambda terms: chained([np.zeros_like(terms[0]), *terms] if zero_start else terms))
    case = a_case(np.random.default_rng(seed), padding=1)
    order = reveal(run, case)
    assert order.fingerprint.zero_start is zero_start
    zeros = case.replace(x=np.zeros_like(case.x))
    assert (bits(replay(order, zeros)) == bits(run(zeros))).all()


def test_a_sum_of_padding_alone_is_a_zero_with_the_sign_of_its_weights(seed):
    run = numpy_convolution(chained)
    case = a_case(np.random.default_rng(seed), taps=(2,), padding=3)
    order = reveal(run, case)
    for sign in (1, -1):
        signed = case.replace(kernel=sign * np.abs(case.kernel))
        assert (bits(replay(order, signed)) == bits(run(signed))).all()


def test_a_bias_added_to_a_rounded_sum_is_revealed_and_replayed(seed):
    def run(case):
        wide = Case(case.x.astype(np.float32), case.kernel.astype(np.float32), padding=case.padding)
        y = Planted(Tree.chain(range(4))).run(wide).astype(case.dtype)
        return y + case.bias

    case = a_case(np.random.default_rng(seed), taps=(4,), bias=True, dtype=ml_dtypes.bfloat16, padding="VALID")
    order = reveal(run, case)
    assert order.fingerprint.bias == "rounded"
    assert (bits(replay(order, case)) == bits(run(case))).all()


def test_an_exact_sum_is_revealed_as_having_no_order(seed):
    case = a_case(np.random.default_rng(seed), taps=(5,), bias=True, padding=2)
    order = reveal(lambda case: exact(case).value, case)
    assert str(interior(order, case)) == "E[0, 1, 2, 3, 4, b]"
    assert order.revealed == 1
    assert (bits(replay(order, case)) == bits(exact(case).value)).all()


def test_a_compensated_sum_is_refused_by_name(seed):
    case = a_case(np.random.default_rng(seed), taps=(9,), spatial=(40,), padding="VALID")
    order = reveal(numpy_convolution(kahan), case)
    assert order.revealed == 0
    assert order.trees == ()
    assert "compensated" in str(order.refusals[0])
    assert np.isnan(replay(order, case)).all()


def winograd(case):
    """F(2, 3) in one dimension (Winograd 1980): two outputs from four products."""
    x = np.pad(case.x, ((0, 0), (1, 2), (0, 0)))
    g = case.kernel[:, 0]
    y = np.zeros(case.geometry.output_shape, np.float32)
    for at in range(0, y.shape[1], 2):
        d = x[:, at : at + 4].swapaxes(0, 1)
        half = np.float32(0.5)
        m = [
            (d[0] - d[2]) * g[0],
            (d[1] + d[2]) * ((g[0] + g[1] + g[2]) * half),
            (d[2] - d[1]) * ((g[0] - g[1] + g[2]) * half),
            (d[1] - d[3]) * g[2],
        ]
        y[:, at] = m[0] + m[1] + m[2]
        if at + 1 < y.shape[1]:
            y[:, at + 1] = m[1] - m[2] - m[3]
    return y


def fourier(case):
    n = case.x.shape[1] + 2
    spectrum = np.fft.rfft(case.x, n, axis=1) * np.conj(np.fft.rfft(case.kernel[:, 0], n, axis=0))
    y = np.roll(np.fft.irfft(spectrum, n, axis=1), 1, axis=1)
    return y[:, : case.x.shape[1]].astype(np.float32)


@pytest.mark.parametrize(("run", "name"), [(winograd, "Winograd"), (fourier, "FFT")])
def test_what_is_no_sum_of_products_is_refused_by_its_signature(run, name, seed):
    case = a_case(np.random.default_rng(seed), spatial=(17,), padding=1)
    np.testing.assert_allclose(run(case), exact(case).value, atol=1e-4)  # it is a convolution, if a rough one
    order = reveal(run, case)
    assert order.revealed == 0
    assert name in str(order.refusals[0])


def test_elements_that_vary_from_run_to_run_are_named(seed):
    planted = Planted(Tree.chain(range(3)))
    case = a_case(np.random.default_rng(seed), padding="VALID")
    runs = 0

    def run(case):
        nonlocal runs
        runs += 1
        y = planted.run(case)
        y[0, 2, 1] += np.float32(1e-6) * runs * (np.abs(case.x).max() not in (0, 1))
        return y

    order = reveal(run, case)
    assert not order.fingerprint.deterministic
    assert isinstance(order.tree((0, 2, 1)), NotASum)
    assert order.tree((0, 0, 0)) is planted.tree


def test_an_element_whose_order_changes_with_the_data_is_refused(seed):
    forwards, backwards = Planted(Tree.chain(range(9))), Planted(Tree.chain(range(8, -1, -1)))
    case = a_case(np.random.default_rng(seed), taps=(9,), spatial=(120,), padding="VALID")

    def run(case):
        y = forwards.run(case)
        if len(np.unique(case.x)) > 1:
            y[0, :50] = backwards.run(case)[0, :50]
        return y

    order = reveal(run, case)
    assert order.revealed == 0
    assert "changes with the data" in str(order.refusals[0])


def test_nan_from_finite_numbers_is_refused(seed):
    planted = Planted(Tree.chain(range(3)))
    case = a_case(np.random.default_rng(seed), padding="VALID")

    def run(case):
        y = planted.run(case)
        y[0, 1, 0] = np.nan
        return y

    order = reveal(run, case)
    assert isinstance(order.tree((0, 1, 0)), NotASum)
    assert order.tree((0, 0, 0)) is planted.tree


def test_masks_that_overflow_are_replaced_by_smaller_ones(seed):
    planted = Planted(Tree.chain(range(5)))
    case = a_case(np.random.default_rng(seed), taps=(5,), padding="VALID")

    def run(case):
        y = planted.run(case)
        return np.where(np.abs(case.kernel).max() > 1e5, np.float32(np.inf), y)

    assert reveal(run, case).trees == (planted.tree,)


def raises(case):
    raise OSError("no such device")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda case: np.zeros((1, 2), np.float32), r"returned float32 \(1, 2\), expected float32 \(1, 5, 2\)"),
        (lambda case: np.zeros(case.geometry.output_shape), "returned float64"),
        (raises, "raises raised OSError on run 1: no such device"),
    ],
)
def test_a_black_box_that_fails_is_reported(run, message, seed):
    with pytest.raises(RuntimeError, match=message):
        reveal(run, a_case(np.random.default_rng(seed), padding="VALID"))


def test_what_is_no_implementation_is_refused():
    with pytest.raises(TypeError, match="`implementation` is 3"):
        reveal(3, a_case(np.random.default_rng(0)))


@pytest.mark.parametrize(
    "options",
    [
        {"taps": (1,), "padding": "VALID"},
        {"taps": (1,), "bias": True, "padding": 1},
        {"taps": (2,), "channels": 1, "padding": 4},
        {"taps": (3,), "spatial": (0,), "padding": 3},
        {"taps": (3,), "spatial": (1,), "padding": "VALID"},
        {"taps": (3,), "padding": "CIRCULAR"},
        {"taps": (3,), "padding": [(2, 2)], "strides": 2, "kernel_dilation": 2, "input_dilation": 3},
        {"taps": (2, 1, 2), "spatial": (3, 2, 3), "padding": 1, "bias": True},
    ],
    ids=str,
)
def test_every_geometry_is_revealed_and_replayed(options, seed):
    case = a_case(np.random.default_rng(seed), **options)
    planted = Planted(Tree.chain([*range(case.geometry.taps), *([BIAS] if case.bias is not None else [])], fused=True))
    assert_explained(reveal(planted, case), planted, case)


def test_a_channel_multiplier_and_batches_are_revealed_and_replayed(seed):
    rng = np.random.default_rng(seed)
    case = Case(*(rng.standard_normal(shape).astype(np.float32) for shape in ((2, 1, 5, 2), (3, 1, 6))), padding=1)
    planted = Planted(Tree.chain(range(3), fused=True))
    assert_explained(reveal(planted, case), planted, case)


@pytest.mark.parametrize("size", [(3, 3), (5, 5), (7, 7)])
def test_a_chain_takes_few_runs(size, seed):
    taps = size[0] * size[1]
    case = a_case(np.random.default_rng(seed), taps=size, spatial=(9, 9), channels=1, padding=size[0] // 2)
    runs = 0

    def run(case):
        nonlocal runs
        runs += 1
        y = np.zeros(case.split_channels(np.empty(case.geometry.output_shape)).shape, np.float32)
        for x, w, _ in case.tap_terms():
            y = y + x * w
        return y.reshape(case.geometry.output_shape)

    order = reveal(run, case)
    assert order.revealed == 1
    assert order.fingerprint.runs == runs <= 3 * (taps - 1) + 12


def test_another_case_than_the_revealed_one_is_not_replayed(seed):
    case = a_case(np.random.default_rng(seed), padding="VALID")
    order = reveal(Planted(Tree.chain(range(3))), case)
    for other in (a_case(np.random.default_rng(seed), padding=1), case.replace(bias=np.zeros(2, np.float32))):
        with pytest.raises(ValueError, match="expected what was revealed"):
            replay(order, other)


def test_an_order_lists_its_classes_and_goes_to_json(seed):
    case = a_case(np.random.default_rng(seed), padding=1)
    order = reveal(Planted(Tree.chain(range(3))), case)
    assert [(str(tree), count, first) for tree, count, first in order.classes()] == [
        ("(0+1)+2", 10, (0, 1, 0)),
        ("1+2", 2, (0, 0, 0)),
        ("0+1", 2, (0, 6, 0)),
    ]
    written = order.to_json()
    assert written["fingerprint"]["accumulator"] == "float32"
    assert [Tree.parse(entry["tree"]) for entry in written["classes"]] == list(order.trees)
