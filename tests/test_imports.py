"""The import graph of `jaxdw` and `bridge`, read from the source: no cycles, and frameworks where the design says."""

import ast
import functools
import itertools
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("jaxdw", "bridge")
    for path in sorted((ROOT / package).rglob("*.py"))
}


@functools.cache
def imports(module, inside_functions):
    """The dotted names that a module imports at its top, `TYPE_CHECKING` included, or inside of its functions."""
    names = {False: set(), True: set()}

    def visit(node, inside):
        if isinstance(node, ast.Import):
            names[inside] |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names[inside] |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif not isinstance(node, ast.expr):
            inside |= isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            for child in ast.iter_child_nodes(node):
                visit(child, inside)

    visit(ast.parse(MODULES[module].read_text()), False)
    return names[inside_functions]


def imported_modules(module, inside_functions=False):
    """The modules of this project that a module names in its imports: `from a import b` is a.b where that is one."""
    found = {
        next((known for known in (name, name.rpartition(".")[0]) if known in MODULES), None)
        for name in imports(module, inside_functions)
    }
    return found - {None, module}


def cycles(graph):
    """The groups of nodes that can reach each other (strongly connected components of more than one node)."""
    reached = {node: set(next_) for node, next_ in graph.items()}
    for middle, node in itertools.product(graph, graph):
        if middle in reached[node]:
            reached[node] |= reached[middle]
    groups = {
        frozenset(other for other in graph if other in reached[node] and node in reached[other]) for node in graph
    }
    return sorted(sorted(group) for group in groups if len(group) > 1)


def package_of(module, depth):
    """The package that holds a module, so many names deep; a module that lies higher stands for itself."""
    parts = module.split(".")
    is_package = MODULES[module].name == "__init__.py"
    return ".".join(parts[:depth] if len(parts) > depth or is_package else parts)


#: The modules of `bridge` that may import a framework. All others work on NumPy arrays.
ALLOWED = {
    "torch": {
        "_implementations.torch_",
        "weights.read",
        "weights.merge",
        "torch_models",
        "torch_ops._arithmetic",
        "torch_ops._depthwise",
        "torch_ops._elementwise",
        "torch_ops._norm",
        "torch_ops._products",
        "torch_ops._tensors",
        "torch_windows",
        "libraries",
        "_census.capture",
        "model.graph_capture",
        "bench.torch_peers",
    },
    "jax": {
        "_implementations.jax_",
        "_implementations.emulated",
        "compiler_probes",
        "audit.compiling",
        "weights.trees",
        "model.jax_side",
        "model.jaxprs",
        "model.primitives",
        "model.defined_operators",
        "model.same_bits",
        "bench.jax_peers",
        "bench.run",
    },
    "flax": {
        "_implementations.jax_",
        "weights.trees",
        "model.jax_side",
        "model.originals",
        "bench.jax_peers",
    },
}

#: Modules of `jaxdw` that import Flax when they are imported: the layers and the models.
FLAX = ("jaxdw._layer", "jaxdw.nnx", "jaxdw.linen", "jaxdw.models")


def test_modules_form_no_cycle():
    assert cycles({module: imported_modules(module) for module in MODULES}) == []


def test_packages_form_no_cycle():
    graph = {package_of(module, 2): set() for module in MODULES}
    for module in MODULES:
        graph[package_of(module, 2)] |= {package_of(other, 2) for other in imported_modules(module)}
    assert cycles(graph) == []


def test_modules_of_jaxdw_form_no_cycle_by_imports_inside_of_functions_either():
    graph = {module: imported_modules(module) | imported_modules(module, inside_functions=True) for module in MODULES}
    assert [group for group in cycles(graph) if any(module.startswith("jaxdw") for module in group)] == []


@pytest.mark.parametrize("module", [module for module in MODULES if module.partition(".")[0] == "jaxdw"])
def test_jaxdw_imports_neither_torch_nor_bridge_and_flax_only_in_layers_and_models(module):
    at_the_top = {name.partition(".")[0] for name in imports(module, inside_functions=False)}
    anywhere = at_the_top | {name.partition(".")[0] for name in imports(module, inside_functions=True)}
    assert not anywhere & {"torch", "bridge"}
    assert "flax" not in at_the_top or module.startswith(FLAX)


@pytest.mark.parametrize("framework", ALLOWED)
def test_only_the_named_modules_of_bridge_import_a_framework(framework):
    found = {
        module.removeprefix("bridge.")
        for module in MODULES
        if module.startswith("bridge")
        for inside_functions in (False, True)
        if framework in {name.partition(".")[0] for name in imports(module, inside_functions)}
    }
    assert found - ALLOWED[framework] == set()


@pytest.mark.parametrize("package", [name for name, path in MODULES.items() if path.name == "__init__.py"])
def test_no_name_of_a_package_hides_one_of_its_modules(package):
    """Imported names, and the keys of a table of names that are imported when they are used."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[package].read_text())):
        if isinstance(node, ast.ImportFrom):
            names = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name, source in names.items() if source not in MODULES}
        elif isinstance(node, ast.Dict):
            found |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
    hidden = {name for name in found if f"{package}.{name}" in MODULES}
    assert hidden == set()
