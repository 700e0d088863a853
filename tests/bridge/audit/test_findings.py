"""Findings of the audit: on real programs for a TPU and a GPU, kept as text, and on planted hazards on this CPU.

`data/` holds the compilers' text for input (8, 56, 56, 144), kernel 3x3, padding 1, float32, made by libtpu 0.0.42.1
for a v5e and by jaxlib 0.10.2 with jax-cuda13-plugin for an H100; without places in source files, shardings, and the
inside of hand-written kernels.
"""

from pathlib import Path

import pytest

from bridge.audit import AuditSubject, audit
from bridge.audit.compiling import Compiled
from bridge.audit.findings import finding
from jaxdw import native
from jaxdw.geometry import Geometry

DATA = Path(__file__).with_name("data")
GEOMETRY = Geometry.of((8, 56, 56, 144), (3, 3, 1, 144), padding=1)
PLANTED = "tests.bridge.audit.planted:"
IN_TILES = 8 * 56 * 56 * 256 * 4  # bytes of the input or the output in whole tiles: 144 channels take 256 lanes
WASTE = "the input takes 1.78 times its size: 144 in 256 lanes"


def read(name, gradient=False, **figures):
    """The finding of a kept program; `figures` are what the compiler says beside the text."""
    text = (DATA / f"{name}.hlo").read_text()
    backend = {"v5e": "tpu", "h100": "gpu"}[name.partition("_")[0]]
    return finding(Compiled(name, text=text, **figures), AuditSubject(GEOMETRY, gradient=gradient), backend)


@pytest.mark.parametrize(
    "name, form, narrowest, hazards",
    [
        ("v5e_taps", "fused loop", "f32", [WASTE]),
        (
            "v5e_grouped",
            "convolution (EmitDepthwiseInputBatchInSublanes), copy",
            "bf16",
            [
                "the input is rounded to bf16 before the copy: copy %copy.3 in %fused_computation.1",
                "the kernel may be rounded to bf16 in convolution %conv_general_dilated.2 in %fused_computation, at "
                "precision default",
                WASTE,
                "copies that compute nothing: %copy.1",
            ],
        ),
        (
            "v5e_patches",
            "convolution (EmitDepthwiseInputBatchInSublanes), copy",
            "bf16",
            [
                "the input is rounded to bf16 before the copy: copy %copy.8 in %fused_computation.2",
                "more products than the sum has: %convolution.4 multiplies 9 times as often as needed",
                WASTE,
                "copies that compute nothing: %copy.5",
            ],
        ),
        (
            "v5e_pallas",
            "hand-written kernel (%_run.1)",
            "f32",
            [
                "hand-written kernel %_run.1: what it rounds and keeps inside is not seen here, and the compiler's "
                "estimate in seconds uses the cost that its author declared",
                WASTE,
            ],
        ),
        ("h100_taps", "fused loop", "f32", []),
        (
            "h100_grouped",
            "library call (__cudnn$convForward)",
            "tf32",
            [
                "the input and the kernel may be rounded to TF32 in custom-call %cudnn-conv.1 in %main.2, at precision "
                "default"
            ],
        ),
        (
            "h100_patches",
            "library call (__cudnn$convForward), fused loop",
            "tf32",
            [
                "the input may be rounded to TF32 in custom-call %cudnn-conv.1 in %main.2, at precision default",
                "windows are materialised: 9 times the input in %cudnn-conv.1",
                "more products than the sum has: %cudnn-conv.1 multiplies 9 times as often as needed",
            ],
        ),
        (
            "h100_pallas",
            "hand-written kernel (_conv_program)",
            "f32",
            ["hand-written kernel _conv_program: what it rounds and keeps inside is not seen here"],
        ),
    ],
)
def test_a_real_program_is_described(name, form, narrowest, hazards):
    found = read(name)
    assert (found.form, found.narrowest, list(found.hazards)) == (form, narrowest, hazards)


def test_certain_roundings_are_distinguished_from_those_that_hardware_decides():
    by_argument = {each.arguments: each for each in read("v5e_grouped").roundings}
    assert by_argument[("x",)].certain and not by_argument[("kernel",)].certain
    assert not any(each.certain for each in read("h100_grouped").roundings)


def test_both_gradients_of_grouped_round_the_input_and_the_gradient_by_the_output_on_a_tpu():
    found = read("v5e_grouped_gradient", gradient=True)
    certain = {name for each in found.roundings if each.certain for name in each.arguments}
    assert (found.narrowest, certain) == ("bf16", {"x", "dy"})
    assert not any("products" in hazard for hazard in found.hazards)


@pytest.mark.parametrize(
    "name, cycles, read_and_written",
    [
        ("v5e_grouped", 132852 + 66066, 2 * IN_TILES),
        ("v5e_taps", 1860 + 1826 + 663456, 2 * IN_TILES),
        ("v5e_pallas", None, 2 * IN_TILES),  # notes cycles for a small copy alone
        ("h100_taps", None, 2 * GEOMETRY.x_shape[0] * 56 * 56 * 144 * 4),
    ],
)
def test_cycles_are_summed_and_bytes_counted_from_shapes(name, cycles, read_and_written):
    found = read(name)
    assert found.estimated_cycles == cycles
    kernel = found.memory_bytes - read_and_written
    assert 0 <= kernel <= 4 * 9 * 256 * 4, "beside input and output, a few copies of the kernel at most"


def test_cycles_of_hand_written_kernels_are_from_the_second_compilation():
    text = (DATA / "v5e_pallas.hlo").read_text()
    counted = '"retry_config":{"retry_count":"0"},"bundle_analysis_data":{"estimated_cycles":"73670"}'
    kernel = next(line for line in text.splitlines() if "tpu_custom_call" in line)
    scheduled = text.replace(kernel, kernel.replace('"retry_config":{"retry_count":"0"}', counted))
    assert scheduled != text
    assert read("v5e_pallas", scheduled=scheduled).estimated_cycles == 73670 + 1836


@pytest.mark.parametrize(
    "name, gradient, given, estimate",
    [
        ("v5e_taps", False, 7e-5, 7e-5),
        ("v5e_grouped_gradient", True, 4e-4 - 2, 4e-4),  # its text has two views that join parts
        ("v5e_taps", False, -1.0, None),
        ("v5e_taps", False, None, None),
    ],
)
def test_the_estimate_is_without_the_ones_that_views_take_off(name, gradient, given, estimate):
    found = read(name, gradient=gradient, optimal_seconds=given).optimal_seconds
    assert found == (None if estimate is None else pytest.approx(estimate, abs=2**-50))  # 2 - 2 in float64


def program(*lines):
    """The finding of a TPU program of x and kernel that returns what the last line makes."""
    x = "  %x = f32[8,56,56,144]{3,2,1,0:T(8,128)} parameter(0)"
    kernel = "  %k = f32[3,3,1,144]{3,2,1,0:T(1,128)} parameter(1)"
    *others, last = lines
    text = "\n".join(["HloModule m", "ENTRY %m {", x, kernel, *others, f"  ROOT {last.strip()}", "}"])
    return finding(Compiled("m", text=text), AuditSubject(GEOMETRY), "tpu")


@pytest.mark.parametrize(
    "window, told", [("[0:8], [0:56], [0:56:2], [0:144]", True), ("[0:8], [0:56:2], [0:56], [0:144]", False)]
)
def test_a_stride_over_rows_of_tiles_is_a_hazard_and_over_whole_tiles_is_none(window, told):
    sizes = "8,56,28,144" if told else "8,28,56,144"
    found = program(f"  %s = f32[{sizes}]{{3,2,1,0:T(8,128)}} slice(%x), slice={{{window}}}")
    assert ("strides fall within tiles: slice %s" in found.hazards) == told


def test_an_array_of_one_channel_wastes_lanes():
    found = program("  %c = f32[8,56,56,144,1]{4,3,2,1,0:T(8,128)} copy(%x)")
    assert "%c takes 128 times its size: 1 in 128 lanes" in found.hazards


def test_a_copy_to_the_chip_is_no_change_of_layout():
    start = "  %s = (f32[8,56,56,144]{3,2,1,0:T(8,128)S(1)}, f32[8,56,56,144]{3,2,1,0:T(8,128)}, u32[]) copy-start(%x)"
    found = program(start, "  %d = f32[8,56,56,144]{3,2,1,0:T(8,128)S(1)} copy-done(%s)")
    assert found.form == "copy" and found.hazards == (WASTE,)
    assert found.memory_bytes == IN_TILES


def test_a_slice_reads_its_part_alone():
    start = (
        "  %s = ((f32[8,56,56,144]{3,2,1,0:T(8,128)}), f32[2,56,56,144]{3,2,1,0:T(8,128)S(1)}, s32[]) slice-start(%x), "
        "slice={[0:2], [0:56], [0:56], [0:144]}"
    )
    found = program(start, "  %d = f32[2,56,56,144]{3,2,1,0:T(8,128)S(1)} slice-done(%s)")
    assert found.memory_bytes == IN_TILES // 4


@pytest.mark.parametrize("temporaries, told", [(1.2, False), (1.3, True)])
def test_large_temporaries_are_a_hazard(temporaries, told):
    padded = 8 * 58 * 58 * 144 * 4
    found = read("h100_taps", temporary_bytes=int(temporaries * padded))
    assert found.temporaries == pytest.approx(temporaries, abs=1 / padded)
    assert list(found.hazards) == ["temporaries take 1.3 times the padded input"] * told


SMALL = Geometry.of((2, 16, 16, 32), (3, 3, 1, 32), padding=1)


@pytest.fixture(scope="module")
def on_this_cpu():
    """The findings of the planted functions, by name."""
    names = (
        "clean",
        "jitted",
        "copy_in_bfloat16",
        "copy_in_float32",
        "fewer_bits_of_the_kernel",
        "as_many_bits_of_the_kernel",
        "product_with_the_identity",
        "columns_first",
        "windows_in_memory",
        "row_by_row",
        "wrong_shape",
        "raises",
    )
    found = audit([PLANTED + name for name in names], AuditSubject(SMALL), "cpu").findings
    return dict(zip(names, found))


@pytest.mark.parametrize("name, narrowest", [("copy_in_bfloat16", "bf16"), ("fewer_bits_of_the_kernel", "tf32")])
def test_a_planted_rounding_is_found(on_this_cpu, name, narrowest):
    found = on_this_cpu[name]
    assert found.narrowest == narrowest and "rounded to" in found.hazards[0]
    assert {argument for each in found.roundings for argument in each.arguments} == (
        {"x"} if name == "copy_in_bfloat16" else {"kernel"}
    )


@pytest.mark.parametrize("name", ["clean", "jitted", "copy_in_float32", "as_many_bits_of_the_kernel"])
def test_its_clean_twin_has_no_hazard(on_this_cpu, name):
    found = on_this_cpu[name]
    assert (found.error, found.narrowest, found.roundings, found.hazards) == ("", "f32", (), ())
    kernel = "library call (jaxdw_conv)" if native.is_available() else "fused loop"
    assert set(found.form.replace("2 x ", "").split(", ")) <= {"fused loop", kernel}


def test_a_transposition_before_the_sum_is_a_copy(on_this_cpu):
    """An operand is in memory before the sum reads it."""
    hazard = on_this_cpu["columns_first"].hazards[-1]  # jaxlib 0.12 copies once more, and its temporaries come first
    assert "copies that compute nothing" in hazard and "transpose" in hazard


@pytest.mark.parametrize(
    "name, hazard",
    [
        ("product_with_the_identity", "multiplies 3.87 times as often as needed"),
        ("windows_in_memory", "windows are materialised: 9 times the input"),
        ("windows_in_memory", "multiplies 9 times as often as needed"),
        ("windows_in_memory", "temporaries take"),
        ("windows_in_memory", "copies that compute nothing"),
        ("row_by_row", "a loop of 16 rounds starts"),
    ],
)
def test_a_planted_hazard_is_found(on_this_cpu, name, hazard):
    found = on_this_cpu[name]
    assert found.narrowest == "f32" and any(hazard in each for each in found.hazards), found.hazards


def test_what_a_function_does_wrong_is_the_error_of_that_function_alone(on_this_cpu):
    assert on_this_cpu["raises"].error.startswith(f"{PLANTED}raises raised RuntimeError")
    assert "as planted" in on_this_cpu["raises"].error
    assert "returned shape (2, 15, 16, 32), expected shape (2, 16, 16, 32)" in on_this_cpu["wrong_shape"].error
    assert not on_this_cpu["clean"].error


def test_dense_gradient_of_grouped_on_this_cpu():
    """XLA:CPU makes the gradient by the kernel a convolution of every channel with every other."""
    (grouped,) = audit(["grouped"], AuditSubject(SMALL, gradient=True), "cpu").findings
    assert any("a dense C x C convolution" in each and "32 times" in each for each in grouped.hazards)


@pytest.mark.parametrize("dtype, narrowest", [("float64", "f64"), ("float32", "f32"), ("bfloat16", "bf16")])
def test_what_was_given_is_the_narrowest_type(dtype, narrowest):
    (found,) = audit(["taps"], AuditSubject(SMALL, dtype, bias=True), "cpu").findings
    assert (found.error, found.narrowest, found.roundings) == ("", narrowest, ())
