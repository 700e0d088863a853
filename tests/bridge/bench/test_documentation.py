"""docs/speed.md against the models that write the file, and the tables of layers."""

import re
from pathlib import Path

import pytest

from bridge.bench import schema
from bridge.bench.run import PEERS
from bridge.bench.suites import layers_of

TEXT = (Path(__file__).parents[3] / "docs/speed.md").read_text()
MODELS = (
    schema.BenchReport,
    schema.BenchSettings,
    schema.SuiteRecord,
    schema.RowRecord,
    schema.WayRecord,
    schema.SummaryRecord,
    schema.CopyRecord,
    schema.ScaleRecord,
    schema.PointRecord,
)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_field_is_documented_in_its_order(model):
    (part,) = re.findall(rf"^### `{model.__name__}`\n(.*?)(?=^##|\Z)", TEXT, re.M | re.S)
    fields = [info.alias or name for name, info in model.model_fields.items()]
    assert re.findall(r"^\| `(\w+)`", part, re.M) == fields


def test_every_model_that_is_written_is_documented_with_its_version():
    assert set(schema.BenchReport.model_json_schema()["$defs"]) | {"BenchReport"} == {m.__name__ for m in MODELS}
    assert f'`schema` | `"{schema.SCHEMA}"`' in TEXT


def test_the_suites_have_the_peers_that_are_documented():
    for suite, (default, more) in PEERS.items():
        (line,) = re.findall(rf"^\| `{suite}` \|.*\| (.*) \|$", TEXT, re.M)
        asked, _, every = line.partition("; ")
        assert re.findall(r"`([\w.]+)`", asked) == list(default)
        assert re.findall(r"`([\w.]+)`", every) == list(more)


def test_the_number_of_layers_is_the_documented_one():
    assert f"# {len(layers_of('layers'))} depthwise layers of seven networks" in TEXT
