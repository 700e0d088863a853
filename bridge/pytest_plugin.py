"""The pytest plugin: fixtures, and reports of the assertions of `bridge.testing` that failed.

pytest imports this module at every start, also where no test uses it. So nothing but pytest and the standard library
is imported here; NumPy, JAX and PyTorch are loaded when a fixture is used or a report is asked for.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import re
import shlex
import sys
import urllib.parse
from collections.abc import Callable, Generator
from html import escape
from pathlib import Path
from typing import Any

import pytest

from bridge.requirements import unmet

#: Prefix of the properties of a failed test. `--junitxml` writes them, and pytest-xdist carries them.
_PREFIX = "parity_"

#: The page that lists the failures, and what it says of itself.
_INDEX, _INDEX_SCHEMA = "index.html", "jaxdw.pytest"

#: The schema of SARIF 2.1.0.
_SARIF_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("parity", "diagnoses of failed assertions of bridge.testing (jaxdw)")
    group.addoption("--parity-report", metavar="DIR", help="write each diagnosis as HTML and JSON, with an index")
    group.addoption(
        "--parity-bundle",
        action="store_true",
        help="also save the data in the folder of --parity-report, for `jaxdw replay`",
    )
    group.addoption("--parity-sarif", metavar="FILE", help="write the failures as SARIF 2.1.0, for code scanning")


@pytest.fixture
def assert_parity() -> Callable[..., Any]:
    """Return `bridge.testing.assert_parity`: two outputs differ by no more than rounding."""
    return _of_testing("assert_parity")


@pytest.fixture
def assert_invariant() -> Callable[..., Any]:
    """Return `bridge.testing.assert_invariant`: no condition changes a bit of one sample."""
    return _of_testing("assert_invariant")


def _of_testing(name: str) -> Callable[..., Any]:
    if lacking := unmet():
        pytest.fail(lacking, pytrace=False)
    return getattr(importlib.import_module("bridge.testing"), name)


def pytest_configure(config: pytest.Config) -> None:
    """Make the folder of the reports, and refuse what could not be written after the tests."""
    if config.option.parity_bundle and not config.option.parity_report:
        raise pytest.UsageError("--parity-bundle is given without --parity-report DIR, where the bundles are saved")
    for name in ("parity_report", "parity_sarif"):
        given = getattr(config, "workerinput", {}).get(name, getattr(config.option, name))
        if given:
            setattr(config.option, name, str(config.invocation_params.dir.joinpath(given)))
    report, sarif = config.option.parity_report, config.option.parity_sarif
    if (report or sarif) and (lacking := unmet()):
        raise pytest.UsageError(lacking)
    try:
        if report:
            Path(report).mkdir(parents=True, exist_ok=True)
        index = Path(report, _INDEX) if report and Path(report, _INDEX).exists() else None
        if (index or sarif) and not hasattr(config, "workerinput"):
            from bridge.files import check_writable  # it loads NumPy

            if index:
                check_writable(index, _INDEX_SCHEMA)
            if sarif:
                check_writable(Path(sarif), "jaxdw.sarif")
    except OSError as error:
        raise pytest.UsageError(f"the reports of parity cannot be written: {error}") from None
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Collector(config), "parity-collector")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Give each process of pytest-xdist the same paths."""
    for name in ("parity_report", "parity_sarif"):
        node.workerinput[name] = getattr(node.config.option, name)


@pytest.hookimpl(hookwrapper=True, tryfirst=True)  # `wrapper` is newer than pluggy 1.0; first: after xfail has decided
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    """Write the reports of a failed assertion, in the process that ran the test."""
    report = (yield).get_result()
    failure = _failure(call.excinfo.value) if call.excinfo is not None and report.failed else None
    if failure is not None and call.excinfo is not None:
        found = {
            "verdict": failure.verdict,
            "meaning": failure.meaning,
            "cause": failure.cause,
            "fix": failure.fix,
            "diagnosis": str(failure),
            "line": str(_line(item, call.excinfo)),
        }
        if folder := item.config.option.parity_report:
            found |= _written(failure, item, Path(folder), "" if call.when == "call" else f"-{call.when}")
        properties = [(_PREFIX + name, value) for name, value in found.items() if value]
        item.user_properties += properties
        report.user_properties = [*report.user_properties, *properties]


class _Collector:
    """The failures of all tests, in the main process."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.found: list[dict[str, str]] = []
        self.ran = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep a failure that has a diagnosis."""
        self.ran |= report.when == "call" or report.failed
        properties = {str(name): str(value) for name, value in report.user_properties}
        own = {name.removeprefix(_PREFIX): value for name, value in properties.items() if name.startswith(_PREFIX)}
        entry = {"test": report.nodeid, "path": report.location[0], **own}
        if report.failed and own and entry not in self.found:
            self.found.append(entry)

    def pytest_sessionfinish(self) -> None:
        """Write the index and the SARIF file, also where nothing failed: they replace those of an older run.

        Where no test was run there is nothing to say, and those of an older run stay.
        """
        report, sarif = self.config.option.parity_report, self.config.option.parity_sarif
        if not self.ran or not (report or sarif):
            return
        from bridge.files import write_atomically

        self.found.sort(key=lambda entry: entry["test"])
        if report:
            write_atomically(Path(report, _INDEX), _index(self.found))
        if sarif:
            write_atomically(Path(sarif), json.dumps(_sarif(self.found), indent=2) + "\n")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Say where the reports are."""
        report = self.config.option.parity_report
        if report and self.found:
            told = f"{len(self.found)} diagnos{'is' if len(self.found) == 1 else 'es'} in {Path(report, _INDEX)}"
            terminalreporter.write_line(f"parity: {told}")


def _failure(error: BaseException | None) -> Any:
    """Return the `bridge.testing.Failure` that an exception is, holds in a group, or was raised from; else None."""
    testing = sys.modules.get("bridge.testing")
    if testing is None or error is None:
        return None
    if isinstance(error, testing.Failure):
        return error
    held = getattr(error, "exceptions", ()) or (error.__cause__,)
    return next(filter(None, map(_failure, held)), None)


def _line(item: pytest.Item, raised: pytest.ExceptionInfo[BaseException]) -> int:
    """Return the last line that led to the failure, from 1, of the file of `item.location`.

    For an inherited test this is the file that defines it, and not `item.path`.
    """
    own = Path(item.reportinfo()[0]).absolute()
    lines = [entry.lineno + 1 for entry in raised.traceback if Path(entry.path) == own]
    return lines[-1] if lines else max(item.location[1] or 0, 0) + 1


def _written(failure: Any, item: pytest.Item, folder: Path, phase: str) -> dict[str, str]:
    """Write the reports of one failure, and return the names of the files. An error here does not stop pytest."""
    from bridge.files import write_atomically

    readable = re.sub(r"[^A-Za-z0-9_.]+", "-", item.nodeid).strip("-.")[-80:]
    stem = f"{readable}-{hashlib.sha256(item.nodeid.encode()).hexdigest()[:8]}{phase}"
    found = {}
    try:
        documents = failure.documents(shlex.join(["pytest", item.nodeid]))
        for ending, text in documents.items():
            write_atomically(folder / f"{stem}.{ending}", text)
            found[ending] = f"{stem}.{ending}"
        if item.config.option.parity_bundle:
            missing = failure.save_bundle(folder / f"{stem}.bundle")
            found |= {"no_bundle": missing} if missing else {"bundle": f"{stem}.bundle"}
    except Exception as error:  # the test has failed already, and its own message must be seen
        found["not_written"] = f"{type(error).__name__}: {error}"
    return found


def _index(found: list[dict[str, str]]) -> str:
    """Return the page that lists the failures."""
    items = []
    for entry in found:
        files = [key for key in ("html", "json", "bundle") if key in entry]
        links = [f'<a href="{urllib.parse.quote(entry[key])}">{key}</a>' for key in files]
        notes = [f"no bundle: {entry['no_bundle']}"] if "no_bundle" in entry else []
        notes += [f"not written: {entry['not_written']}"] if "not_written" in entry else []
        items.append(
            f"<li><h2>{escape(entry['verdict'])}: {escape(entry['test'])}</h2>\n"
            f"<p>{' '.join([*links, *map(escape, notes)])}</p>\n<pre>{escape(entry['diagnosis'])}</pre></li>"
        )
    count = f"{len(found)} failed assertion{'' if len(found) == 1 else 's'} with a diagnosis"
    return _PAGE.format(schema=_INDEX_SCHEMA, count=count, items="\n".join(items))


_PAGE = """<!doctype html>
<!-- {schema} -->
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>jaxdw: {count}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h2 {{ font-size: 1rem; overflow-wrap: anywhere; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
ol {{ padding-left: 1.5rem; }}
</style></head>
<body><h1>{count}</h1>
<ol>
{items}
</ol></body></html>
"""


def _sarif(found: list[dict[str, str]]) -> dict[str, Any]:
    """Return the failures as a SARIF 2.1.0 log: one rule per verdict, one result per failure."""
    rules = {entry["verdict"]: entry["meaning"] for entry in found}
    results = [
        {
            "ruleId": entry["verdict"],
            "ruleIndex": list(rules).index(entry["verdict"]),
            "level": "error",
            "message": {"text": f"{entry['test']}\n{entry['diagnosis']}"},
            "locations": [
                {
                    "physicalLocation": {
                        "artifactLocation": {
                            "uri": urllib.parse.quote(Path(entry["path"]).as_posix()),
                            "uriBaseId": "%SRCROOT%",
                        },
                        "region": {"startLine": int(entry["line"])},
                    }
                }
            ],
            "partialFingerprints": {"test/v1": hashlib.sha256(entry["test"].encode()).hexdigest()},
        }
        for entry in found
    ]
    driver = {
        "name": "jaxdw",
        "version": importlib.metadata.version("jaxdw"),
        "rules": [{"id": rule, "shortDescription": {"text": meaning}} for rule, meaning in rules.items()],
    }
    return {"$schema": _SARIF_SCHEMA, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}
