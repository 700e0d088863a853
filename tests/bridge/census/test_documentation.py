"""docs/census.md against the code."""

import importlib.util
import re
from pathlib import Path

from bridge._census import record

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs/census.md").read_text()


def test_every_field_of_a_line_is_documented_in_its_order():
    fields = [info.alias or name for name, info in record.CensusRecord.model_fields.items()]
    assert re.findall(r"^\| `(\w+)` \|", TEXT, re.M) == fields
    assert f'`"{record.SCHEMA}"`' in TEXT
    assert all(
        f"`{name}`" in TEXT
        for model in (record.CensusLayerRecord, record.CensusSettings)
        for name in model.model_fields
    )


def test_the_models_of_the_benchmark_are_those_of_the_table():
    spec = importlib.util.spec_from_file_location("census_benchmark", ROOT / "benchmarks/census.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    rows = re.findall(r"^\| ((?:timm|torchvision):\S+) \| (\d+) \|", TEXT, re.M)
    assert [name for name, _ in rows] == list(benchmark.MODELS)
    assert len(rows) == 40 and f"{sum(int(count) for _, count in rows)} depthwise layers" in TEXT
