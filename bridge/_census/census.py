"""census: one verdict per depthwise convolution of a PyTorch model, on the data that really flow through it."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bridge._census.calls import Capture, CapturedCall
from bridge._implementations import Implementation, implementation
from bridge.accumulation import MOST_TAPS
from bridge.diagnosis import Comparison, Diagnosis, Verdict, compare, parity
from bridge.numerics import same_bits

#: PyTorch's convolution, which runs in the memory layout that the model used.
TORCH = "torch.conv2d"

#: The implementations compared on each layer: PyTorch's convolution, lax's, and jaxdw's method with PyTorch's order.
DEFAULT = (TORCH, "jax.grouped", "jax.taps")

#: What takes the place of an implementation on a transposed convolution.
TRANSPOSED = {TORCH: "torch.conv_transpose2d", "jax.taps": "jax.transpose"}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LayerDiagnosis(Diagnosis):
    """The Diagnosis of one depthwise convolution of a model.

    Attributes:
      layer: its name in the model; "features.0 (call 2)" where the same layer ran before on other data.
      kind: the class of the module that ran it.
      own: the model's own output against `torch.conv2d`, or `torch.conv_transpose2d`, on the captured data.
      note: a remark on how it was captured, or empty.
      also: other calls with the same geometry and data, to which this diagnosis applies too.
    """

    layer: str
    kind: str
    own: Comparison
    note: str = ""
    also: Sequence[str] = ()

    @property
    def verdict(self) -> Verdict:
        """The weakest verdict of all pairs, all integer tests, and the model's own output."""
        return max(super().verdict, self.own.verdict, key=Verdict.rank)


def census(
    torch_module: Any,
    inputs: Any,
    *,
    implementations: Sequence[str | Implementation] = DEFAULT,
    explain: bool | None = False,
) -> Iterator[LayerDiagnosis]:
    """Yield one Diagnosis per depthwise convolution (1-D to 3-D) that a model runs, on its real input and weights.

    The model runs once, in eval mode. Its convolutions wait on disk, and each is diagnosed when it is asked for, so
    that the memory needed is that of one layer. Calls with the same geometry and the same data are diagnosed once.

    Args:
      torch_module: an `nn.Module`.
      inputs: what its forward takes, as NumPy arrays or tensors: one, a sequence by place, or a mapping by name.
      implementations: what to compare, as for `parity`; "torch.conv2d" runs in the memory layout that the model used.
        On a transposed convolution it is "torch.conv_transpose2d", and "jax.taps" is "jax.transpose".
      explain: reveal and replay each implementation's accumulation order, as for `parity`; slower.

    Raises:
      TypeError: `torch_module` is no `nn.Module`.
      ValueError: its forward fails, or no depthwise convolution runs in it.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.nn.ReLU())
    >>> [(each.layer, each.verdict.passes) for each in census(model, torch.randn(1, 8, 6, 6))]
    [('0', True)]
    """
    from bridge._census.capture import capture

    with tempfile.TemporaryDirectory(prefix="jaxdw-census-") as folder:
        captured = capture(torch_module, inputs, Path(folder))
        if not captured.calls:
            raise ValueError(f"`torch_module` is a {type(torch_module).__name__} with {nothing_in(captured)}")
        for call in captured.calls:
            yield diagnose(call, implementations, explain=explain)


def diagnose(
    call: CapturedCall, implementations: Sequence[str | Implementation] = DEFAULT, *, explain: bool | None = False
) -> LayerDiagnosis:
    """Run `parity` on one captured call, and compare the model's own output with `torch.conv2d`. Remove its file."""
    case, y = call.load()
    chosen = [implementation(each) if isinstance(each, str) else each for each in implementations]
    reference = TORCH
    if call.input_dilation is not None:
        reference = TRANSPOSED[TORCH]
        chosen = [
            implementation(each.name.replace(each.base, TRANSPOSED.get(each.base, each.base), 1)) for each in chosen
        ]
    torch_ = implementation(reference).changed(layout=call.layout)
    chosen = [torch_ if each == implementation(reference) else each for each in chosen]
    note = call.note
    if explain and case.geometry.taps > MOST_TAPS:
        explain = False
        note = "; ".join(filter(None, [note, f"not explained, since it has more than {MOST_TAPS} taps"]))
    found = parity(case, chosen, explain=explain, remedy=False)
    again = found.outputs[torch_.name] if torch_.name in found.outputs else torch_.run(case)
    names = ("the model's own output", torch_.name)
    if same_bits(y, again).all():
        own = Comparison(*names, Verdict.IDENTICAL, y.size, 0, 0.0, 0, 0.0)
    else:
        own = compare(y, again, case, names=names, arithmetics=(None, torch_.arithmetic(case)))
    call.path.unlink()
    fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    return LayerDiagnosis(**fields, layer=call.layer, kind=call.kind, own=own, note=note, also=call.also)


def nothing_in(captured: Capture) -> str:
    """Say why there is nothing to compare."""
    parts = [f"no depthwise convolution among the {captured.convolutions} that ran"]
    if captured.passed_over:
        parts.append(f"passed over: {'; '.join(captured.passed_over)}")
    if captured.idle:
        parts.append(f"depthwise, but did not run: {', '.join(captured.idle)}")
    return "; ".join(parts)
