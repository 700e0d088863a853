"""Run the tests on the oldest versions, the newest, and some between; write the results into docs/versions.md.

Each row has its own environment in build/versions. A row is skipped with one line if its Python is not on this machine,
or if its packages cannot be installed. `make test-versions` runs all rows. `--sample` runs a few minutes of tests on
the newest versions, with the compiled kernels of this environment, and writes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from jaxdw import native

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / "build" / "versions"
PAGE = ROOT / "docs" / "versions.md"
BEGIN, END = "<!-- written by `make test-versions` -->\n", "<!-- end -->"
HEAD = "| versions | Python | jax | flax | NumPy | torch | tests/jaxdw | tests/bridge | processor | date |\n"
RULE = "| --- " * HEAD.count(" | ") + "| --- |\n"

#: Packages that the tests need besides those of a row.
TOOLS = (
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "safetensors",
    "ml_dtypes",
    "typer",
    "rich",
    "pydantic",
    "jinja2",
    "scipy",
)
#: Methods with their derivatives, the Flax modules, the drop-in, meshes, kernels for GPUs, and the messages.
SAMPLE = (
    *("test_geometry.py", "test_nnx.py", "test_linen.py", "test_conv.py::test_bad_input_is_named"),
    "test_conv.py::test_every_method_runs_under_jit_vmap_and_second_derivatives",
    "test_drop_in.py::test_shard_map_is_exact_on_integers",
    "test_drop_in.py::test_hessian_vector_products_are_exact_on_integers",
    "test_drop_in.py::test_explicit_sharding_of_results_and_gradients_is_that_of_lax",
    "lowerings/test_pallas_gpu.py::test_kernels_are_what_is_lowered_for_nvidia_gpus",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One environment.

    Attributes:
      python: major and minor version.
      packages: pinned versions; the tests of `bridge` run if torch is among them.
    """

    python: str
    packages: Mapping[str, str]


NEWEST = {"jax": "0.12.0.1", "flax": "0.12.12", "numpy": "2.5.5"}
TORCH = {"torch": "2.15.0"}
ROWS = {
    "oldest": Row("3.11", {"jax": "0.8.2", "flax": "0.12.4", "numpy": "2.0.2", "torch": "2.13.0"}),
    "between": Row("3.11", {"jax": "0.10.2", "flax": "0.12.8", "numpy": "2.4.6", "torch": "2.13.0"}),
    "newest": Row("3.12", NEWEST | TORCH),
    "newest, Python 3.13": Row("3.13", NEWEST),
}


def interpreter(version: str) -> str | None:
    """Return the newest Python `version` of this machine: this one, one of pyenv's, or one on the path."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    installed = sorted((root / "versions").glob(f"{version}.*/bin/python"), key=lambda path: _number(path.parts[-3]))
    found = [sys.executable, *map(str, reversed(installed)), shutil.which(f"python{version}")]
    code = "import sys, ensurepip, venv; print('%d.%d' % sys.version_info[:2])"
    for path in filter(None, found):
        done = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip() == version:
            return path
    return None


def _number(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def environment(name: str, row: Row, *options: str) -> Path | None:
    """Return the Python of a row's environment, made again if its pins changed; None after a line with the reason.

    `options` are those of pip for the installation of jaxdw.
    """
    folder = ENVIRONMENTS / re.sub(r"\W+", "-", name)
    pins = [*(f"{package}=={version}" for package, version in row.packages.items()), *map(_pinned, TOOLS)]
    pins.append("optax")  # some releases of Flax need one of its versions alone
    python, ready, installed = folder / "bin" / "python", folder / ".ready", " ".join([*pins, "jaxdw"])
    if ready.exists() and ready.read_text() == installed:
        return python
    base = interpreter(row.python)
    if base is None:
        print(f"{name}: skipped, no Python {row.python} here; pyenv install {row.python} brings one", flush=True)
        return None
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([base, "-m", "venv", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    done = subprocess.run([*install, *pins], capture_output=True, text=True, check=False)
    if done.returncode and "torch" in row.packages:
        packages = {package: version for package, version in row.packages.items() if package != "torch"}
        print(f"{name}: without PyTorch {row.packages['torch']}: {_last_line(done)}", flush=True)
        return environment(name, dataclasses.replace(row, packages=packages), *options)
    if done.returncode:
        print(f"{name}: skipped, its packages cannot be installed: {_last_line(done)}", flush=True)
        return None
    # jaxdw itself, for its compiled kernels; without a compiler XLA computes all
    subprocess.run([*install, "--no-deps", *options, "-e", str(ROOT)], check=True)
    ready.write_text(installed)
    return python


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or ["pip failed"])[-1]


def _pinned(package: str) -> str:
    """Return the pin of constraints.txt; these versions install on every Python."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.partition("==")[0].strip() == package)


def _installed(python: Path, package: str) -> str:
    """Return the version of an installed package, empty if it is not installed."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([str(python), "-P", "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip().partition("+")[0]


def run(name: str, python: Path, *arguments: str, **variables: str) -> tuple[bool, str]:
    """Run pytest; return whether all passed, and its counts in words. `variables` are added to the environment."""
    command = [str(python), "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", *arguments]
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", **variables}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=variables)
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", (done.stdout.strip().splitlines() or [""])[-1])
    if done.returncode:
        print(done.stdout, flush=True)
    words = ", ".join(counts) or f"ended with {done.returncode}"
    print(f"{name}: {words}", flush=True)
    return done.returncode == 0, words


def write(lines: Mapping[str, str]) -> None:
    """Replace these rows of the table in one step, and keep the others."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    table, _, after = rest.partition(END)
    kept = {line.split(" | ")[0].strip("| "): line for line in table.splitlines(keepends=True) if line.startswith("| ")}
    kept |= lines
    draft = PAGE.with_suffix(".new")
    draft.write_text(f"{before}{BEGIN}{HEAD}{RULE}{''.join(kept[name] for name in ROWS if name in kept)}{END}{after}")
    draft.replace(PAGE)


def main() -> int:
    """Run the rows that the command line names; return 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sample", action="store_true", help="a few minutes of the newest versions; writes nothing")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="default: all")
    options = parser.parse_args()
    if options.sample:
        return 0 if _sample() else 1
    good = True
    for name in options.rows:
        row = ROWS[name]
        python = environment(name, row)
        if python is None:
            continue
        passed, words = run(name, python, "tests/jaxdw")
        torch = _installed(python, "torch")
        bridge_passed, bridge_words = run(name, python, "tests/bridge") if torch else (True, "")
        good &= passed and bridge_passed
        versions = [*(row.packages[package] for package in ("jax", "flax", "numpy")), torch]
        day = datetime.date.today().isoformat()
        cells = [name, row.python, *versions, words, bridge_words, _processor(), day]
        write({name: f"| {' | '.join(cells)} |\n"})
    return 0 if good else 1


def _sample() -> bool:
    """Run the sample; return whether all passed. A library of the kernels runs with newer releases of jaxlib, too."""
    built = {"JAXDW_NATIVE": os.path.abspath(native.library()._name)} if native.is_available() else {}
    python = environment("sample", Row(ROWS["newest"].python, NEWEST), "-C", "wheel.cmake=false")
    return python is None or run("newest", python, *(f"tests/jaxdw/{test}" for test in SAMPLE), **built)[0]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
