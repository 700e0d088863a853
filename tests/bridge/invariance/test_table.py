"""The table of conditions: planted changes are counted and explained, and a clean twin has none."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from bridge import Case, invariance
from bridge._invariance import conditions as rows_of
from bridge._invariance.record import Cell, Change, Row
from bridge.testing import InvarianceFailure, assert_invariant
from tests.bridge.cli.command import jaxdw
from tests.bridge.diagnosis.mutations import backwards, in_order

HERE = ["run", "batch", "position", "others"]


@pytest.fixture
def case(seed):
    rng = np.random.default_rng(seed)
    return Case(rng.standard_normal((2, 6, 7, 3), np.float32), rng.standard_normal((3, 3, 1, 3), np.float32), padding=1)


class Planted:
    """An implementation that is a function of a case, and has no name by which another process could find it."""

    def __init__(self, function):
        self.name, self.run = "planted", function


def symbols(table):
    return {row.label: row.cells[0].symbol for row in table.rows}


def test_an_order_that_depends_on_the_batch_is_counted_and_explained_once(case):
    table = invariance(
        case,
        [Planted(lambda case: in_order(case) if len(case.x) == 1 else backwards(case))],
        conditions=HERE,
        batches=(2, 5),
    )
    found = symbols(table)
    assert found["batch of 2"] == found["batch of 5"] != "="
    assert {found[label] for label in ("second run", "second of 8", "last of 8", "other data in 8")} == {"="}
    (change,) = table.changes
    assert change.conditions == ["batch of 2", "batch of 5"] and change.explained
    assert change.explanation.startswith("The sample alone and batch of 2 first diverge at ")
    assert str(change.different) == found["batch of 2"] and change.elements >= 1000


@pytest.mark.parametrize(
    "label, function",
    [
        ("last of 8", lambda case: np.concatenate([*(in_order(one(case, n)) for n in range(7)), backwards(case)[7:]])),
        ("other data in 8", lambda case: in_order(case) + np.float32(0.01) * (len(case.x) == 8) * case.x[-1, 0, 0, 0]),
    ],
)
def test_a_result_that_depends_on_position_or_on_other_samples_is_found(case, label, function):
    def of_eight(case):
        return function(case) if len(case.x) == 8 else in_order(case)

    found = symbols(invariance(case, [Planted(of_eight)], conditions=["position", "others"], explain=False))
    assert found[label] not in ("=", "?", "-")


def one(case, number):
    return case.replace(x=case.x[number : number + 1])


def test_equal_orders_with_another_arithmetic_are_told_apart(case):
    def rounded(case):
        y = in_order(case)
        return y if len(case.x) == 1 else (y.view(np.int32) & -256).view(np.float32)

    (change,) = invariance(case, [Planted(rounded)], conditions=["batch"]).changes
    assert not change.explained or "rounding of the output" in change.explanation


def test_a_clean_implementation_keeps_every_bit_and_what_needs_a_name_does_not_apply(case):
    table = assert_invariant(Planted(in_order), case, conditions=[*HERE, "threads", "jit"])
    assert table.changes == [] == table.undecided
    assert {cell.reason for row in table.rows for cell in row.cells if not cell.applies} == {
        "only PyTorch and JAX have a pool of threads",
        "only JAX has jit",
    }


def test_the_failure_names_each_change_and_carries_the_table(case):
    with pytest.raises(
        InvarianceFailure, match=r"1. planted changes with batch of 2, batch of 3, batch of 8: "
    ) as failure:
        assert_invariant(Planted(lambda case: in_order(case) if len(case.x) == 1 else backwards(case)), case)
    assert failure.value.table.exit_code == 1


MODULE = """
import os
import torch

def one_by_one(x, weight):
    order = range(9) if "ONEDNN_MAX_CPU_ISA" not in os.environ else range(8, -1, -1)
    x = torch.nn.functional.pad(x, (1, 1, 1, 1))
    y = torch.zeros(1)
    for tap in order:
        i, j = divmod(tap, 3)
        y = y + x[:, :, i : i + x.shape[2] - 2, j : j + x.shape[3] - 2] * weight[:, 0, i, j, None, None]
    return y

def ends(x, weight):
    if "ONEDNN_MAX_CPU_ISA" in os.environ:
        os._exit(3)
    return one_by_one(x, weight)
"""


def test_a_process_of_its_own_reveals_the_order_there_and_one_that_ends_costs_one_cell(case, tmp_path, monkeypatch):
    (tmp_path / "planted_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rows_of, "_INSTRUCTION_SETS", {"torch": {"ONEDNN_MAX_CPU_ISA": (("AVX2",), ("AVX2",))}})
    names = ["planted_module:ends", "planted_module:one_by_one"]
    table = invariance(case, names, conditions=["isa"])
    (row,) = table.rows
    assert row.label == "ONEDNN_MAX_CPU_ISA=AVX2"
    ended, changed = row.cells
    assert ended.symbol == "?" and "its process ended" in ended.reason
    assert changed.different and table.changes[changed.change].explained
    assert "The sample alone and ONEDNN_MAX_CPU_ISA=AVX2 first diverge" in table.changes[0].explanation
    assert table.undecided == [f"planted_module:ends, {row.label}: {ended.reason}"]


def test_the_command_prints_the_table_and_writes_it(tmp_path):
    path = tmp_path / "table.json"
    options = ("--conditions", "batch,layout,compile,sharding", "--json", path, "--fail-on-change")
    code, out, _ = jaxdw("invariance", "torch.conv2d", "jax.grouped", *options)
    table = json.loads(path.read_text())
    assert table["schema"] == "jaxdw.invariance/1" and table["implementations"] == ["torch.conv2d", "jax.grouped"]
    cells = {row["label"]: row["cells"] for row in table["rows"]}
    assert [cell["applies"] for cell in cells["channels_last"]] == [True, False]
    assert [cell["applies"] for cell in cells["torch.compile"]] == [True, False]
    assert cells["torch.compile"][0]["different"] == 0 or "compiler" in cells["torch.compile"][0]["reason"].lower()
    assert cells["sharded batch"][1]["different"] is not None and not cells["sharded batch"][0]["applies"]
    decided = all(cell["different"] is not None or not cell["applies"] for row in cells.values() for cell in row)
    assert code == (1 if table["changes"] else 0 if decided else 4)
    assert "No condition changed a bit of" in " ".join(out.split()) and "sharded channels" in out


@pytest.mark.parametrize(
    "options, message",
    [
        ({"conditions": ["weather"]}, "`conditions` has 'weather', expected some of run, batch"),
        ({"batches": (1, 2)}, "`batches` has 1, expected numbers of two or more"),
        ({"implementations": []}, "expected at least one, each once"),
    ],
)
def test_arguments_are_checked(case, options, message):
    with pytest.raises(ValueError, match=message):
        invariance(case, **{"implementations": ["torch.conv2d"], **options})


def test_a_case_without_a_sample_is_refused(case):
    with pytest.raises(ValueError, match="expected at least one element"):
        invariance(case.replace(x=case.x[:0]), ["torch.conv2d"])


def test_the_page_lists_every_kind_and_every_field_and_its_example_runs(capsys):
    text = (Path(__file__).parents[3] / "docs/invariance.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == list(rows_of.KINDS)
    for name, record in (("row", Row), ("cell", Cell), ("change", Change)):
        (fields,) = re.findall(rf"^\| a {name} \| (.*) \|$", text, re.MULTILINE)
        assert re.findall(r"`(\w+)`", fields) == list(record.model_fields)
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(example, {})
    assert capsys.readouterr().out.startswith("[['=', '=']")
