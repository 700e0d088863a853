"""docs/report.md against the models that write the files."""

import re
from pathlib import Path

import pytest

from bridge.report import Report, bundle, schema

TEXT = (Path(__file__).parents[3] / "docs/report.md").read_text()
MODELS = (
    Report,
    schema.CaseRecord,
    schema.ComparisonRecord,
    schema.IntegerTestRecord,
    schema.OrderRecord,
    schema.AttributionRecord,
    schema.FactorRecord,
    schema.ConfigurationRecord,
    schema.FlipRecord,
    schema.EliminationRecord,
    schema.ChangeRecord,
    bundle.BundleManifest,
    bundle.SavedCase,
    bundle.ArrayRecord,
    bundle.OutputRecord,
    bundle.SavedVerdict,
)


def documented(name):
    """The fields in the table under the heading of that name, and the models that it refers back to."""
    (part,) = re.findall(rf"^### `{name}`\n(.*?)(?=^##|\Z)", TEXT, re.M | re.S)
    return re.findall(r"^\| `(\w+)`", part, re.M), re.findall(r"^The fields of `(\w+)`", part, re.M)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_field_is_documented_in_its_order(model):
    own, inherited = documented(model.__name__)
    fields = [field for name in inherited for field in documented(name)[0]] + own
    assert fields == [info.alias or name for name, info in model.model_fields.items()]


def test_every_model_that_is_written_is_documented():
    written = {name for model in (Report, bundle.BundleManifest) for name in model.model_json_schema()["$defs"]}
    assert written - {"Verdict"} <= {model.__name__ for model in MODELS}


@pytest.mark.parametrize("version", [schema.SCHEMA, bundle.SCHEMA])
def test_the_versions_are_those_of_the_code(version):
    assert f'`schema` | `"{version}"`' in TEXT


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_infinity_is_written_as_the_documented_word(model):
    (part,) = re.findall(rf"^### `{model.__name__}`\n(.*?)(?=^##|\Z)", TEXT, re.M | re.S)
    numbers = {
        name
        for name, info in model.model_fields.items()
        if "PlainSerializer" in str(info.annotation) + str(info.metadata) and "tuple" not in str(info.annotation)
    }
    assert numbers == set(re.findall(r"^\| `(\w+)` †", part, re.M))
