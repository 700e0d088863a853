"""Seeds, the full or sampled run, and JAX's strict settings."""

import collections
import gc
import itertools
import os
import random

# XLA reads its flags once; a test run never looks for an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

from tests.programs import release_programs

_tests = itertools.count()

hypothesis.settings.register_profile(
    "sample", deadline=None, print_blob=True, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile("sample")


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, help="repeat a run: the seed that its header printed")
    parser.addoption("--full", action="store_true", help="the full counts instead of a sample")


def pytest_configure(config):
    given = getattr(config, "workerinput", {}).get("seed", config.option.seed)
    config.option.seed = random.SystemRandom().randrange(2**32) if given is None else given
    config.option.hypothesis_seed = str(config.option.seed)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """In a sample run keep so many cases of a test as its mark `sampled` says, drawn with the run's seed."""
    cases = collections.defaultdict(list)
    for item in items if not config.option.full else ():
        if mark := item.get_closest_marker("sampled"):
            cases[item.nodeid.partition("[")[0], *mark.args].append(item)
    dropped = set()
    for (name, count), each in cases.items():
        order = random.Random(f"{config.option.seed} {name}")
        dropped.update(order.sample(each, max(0, len(each) - count)))
    config.hook.pytest_deselected(items=list(dropped))
    items[:] = [item for item in items if item not in dropped]


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Give each process of pytest-xdist the run's seed."""
    node.workerinput["seed"] = node.config.option.seed


def pytest_report_header(config):
    return f"seed: {config.option.seed} (repeat with --seed {config.option.seed})" + (
        ", full counts" if config.option.full else ", sampled counts"
    )


def pytest_sessionstart(session):
    """With -q pytest prints no header; a run that dies prints no summary either."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and reporter.verbosity < 0:
        reporter.write_line(pytest_report_header(session.config))


def pytest_collection_finish():
    """Libraries and tests are there to the end: the garbage collector need not look at them again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def seed(request) -> int:
    """The run's seed."""
    return request.config.option.seed


@pytest.fixture
def full(request) -> bool:
    """True where the full counts run."""
    return request.config.option.full


@pytest.fixture
def x64():
    """float64 enabled."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def strict():
    """Dtypes never promote by accident, and ranks never broadcast by accident."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
    if next(_tests) % 8 == 0:  # to count mappings takes up to 15 ms
        release_programs()
