"""The table of methods, and what "auto" takes from it."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdw import Geometry
from jaxdw.auto import choose
from jaxdw.bias import starts_from_bias
from jaxdw.call import Call
from jaxdw.methods import METHODS, NAMES, check_method, resolve
from jaxdw.native import is_available

SMALL, LARGE = (Geometry.of((1, 9, 9, 4), (size, size, 1, 4)) for size in (3, 7))


def test_the_documents_describe_every_method():
    page = (Path(__file__).parents[2] / "docs/methods.md").read_text()
    assert [name for name in NAMES if f"\n| `{name}` |" not in page] == []


@pytest.mark.parametrize(
    "geometry, platform, method",
    [(SMALL, "cpu", "taps"), (LARGE, "cpu", "rows"), (LARGE, "cuda", "taps"), (LARGE, "tpu", "taps")],
)
def test_auto_is_rows_only_for_large_kernels_on_a_cpu_without_compiled_kernels(geometry, platform, method, monkeypatch):
    assert not is_available() or choose(geometry, platform) == "taps"
    monkeypatch.setattr("jaxdw.auto.is_available", lambda: False)
    assert choose(geometry, platform) == method
    assert resolve("auto", geometry, platform) == resolve(method, geometry, platform)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu", "rocm", None])
def test_each_method_has_lowerings_in_its_order_or_a_function_of_lax(platform):
    for name, method in METHODS.items():
        assert method.guarantee and (method.function is None) == bool(method.lowerings)
        assert (method.order is None) == (name in ("fft", "patches", "grouped"))
        if method.order and (name != "pallas" or platform in ("cpu", "cuda", "tpu")):
            assert resolve(name, SMALL, platform)[0] == method.order


def test_only_sums_in_raster_order_start_from_the_bias():
    assert [name for name in NAMES if starts_from_bias(name, SMALL)] == ["auto", "taps", "pallas"]
    automatic = ["auto"] if is_available() else []
    assert [name for name in NAMES if starts_from_bias(name, LARGE)] == [*automatic, "taps", "pallas"]


def test_what_is_no_method_is_named():
    with pytest.raises(ValueError, match="`method` is 'fast', expected one of auto, taps, rows"):
        check_method("fast")


def test_a_call_is_checked_once_and_keeps_its_dtypes():
    x, kernel = np.ones((1, 4, 4, 2), np.float16), np.ones((3, 3, 1, 2), np.float32)
    with jax.numpy_dtype_promotion("standard"):
        call = Call.of(x, kernel, padding="VALID", precision="highest")
        assert (call.x.dtype, call.result, call.geometry.output_shape) == (np.float16, np.float32, (1, 2, 2, 2))
        assert call.promoted().x.dtype == np.float32 and call.without_products() is None
    with pytest.raises(ValueError, match="`kernel` has shape"):
        Call.of(x, kernel[..., 0])
