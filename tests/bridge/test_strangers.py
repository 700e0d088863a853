"""A folder of strangers' files: the command runs none of them but what the user names."""

import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch

from bridge import cli, libraries, process
from tests.references import reference

ROOT = Path(__file__).parent.parent.parent

#: Every name that this Python knows, and what is looked for though it may not be installed.
NAMES = {
    *sys.stdlib_module_names,
    *(name for name in importlib.metadata.packages_distributions() if name.isidentifier()),
    *("libtpu", "IPython", "treescope", "triton", "cupy", "jax_plugins", "bridge", "jaxdw"),
    *("sitecustomize", "usercustomize"),
}

#: The console script, which also plants each module at the moment that it is looked for, installed or not.
SCRIPT = """
import json, os, sys

class Trap:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if path is None and not os.path.exists(name + ".py") and not os.path.exists(name):
            with open(name + ".py", "w") as file:
                file.write(PLANTED.format(name=name))

PLANTED = os.environ["PLANTED"]
sys.meta_path.insert(0, Trap)
from bridge import compiler_probes
from bridge.__main__ import main
compiler_probes.PROBES = compiler_probes.PROBES[:2]  # each in a process as all are
codes = []
for words in json.loads(os.environ["COMMANDS"]):
    sys.argv[1:] = words
    try:
        main()
    except SystemExit as end:
        codes.append(end.code)
    else:
        codes.append(0)
print(json.dumps(codes))
"""

MINE = """
import jax.numpy as jnp
import jaxdw

def conv(x, kernel):
    import sibling  # the first time that it is called
    return sibling.conv(x, kernel)

def network():
    from networks import small
    return small()
"""

NETWORKS = """
import torch, torchvision
def small():
    return torch.nn.Conv2d(3, 3, 3, groups=3)
"""


class Folder:
    """A folder with a planted module of each name, which leaves a mark where it is run; and the user's own."""

    def __init__(self, folder, names):
        self.path, self.marks = folder / "strangers", folder / "marks"
        self.path.mkdir()
        self.planted = f"open({str(self.marks)!r}, 'a').write('{{name}} ')\n"
        for name in names:
            (self.path / f"{name}.py").write_text(self.planted.format(name=name))
        (self.path / "mine.py").write_text(MINE)
        (self.path / "networks.py").write_text(NETWORKS)
        (self.path / "sibling.py").write_text(
            "import jaxdw\ndef conv(x, kernel): return jaxdw.depthwise_conv(x, kernel, padding=1)\n"
        )

    def python(self, *words, **environment):
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=self.path,
            env={**os.environ, "PLANTED": self.planted, "COLUMNS": "80", **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert not self.marks.exists(), f"run from the folder: {self.marks.read_text()}"
        return done


def commands(folder, full):
    """Each command, as short as it can be; with the user's own function where it takes one."""
    small = ["--shape", "1x4x4x3"]
    own = ["parity", *small, "--implementations"]
    convert = ["convert", str(folder / "v3.pth")]
    yield ["doctor", "--cases", "1"]
    yield [*own, "torch.conv2d,mine:conv", "--bundle", "saved", "--html", "report.html"]
    yield [*own, "mine:conv,mine:conv[xla=O0]", "--no-explain"]  # the second in a process of its own
    yield ["replay", "saved", "--import-functions"]
    yield ["reveal", "mine:conv", *small]
    yield ["audit", "mine:conv", *small]
    yield ["census", "mine:network", "--size", "8"]
    yield from ([*convert, "v3.safetensors", "--width", "0.5"], [*convert, "v3", "--to", "orbax", "--width", "0.5"])
    yield ["bench", "--layers", "8x8x4:3:1", "--batch", "1", "--rounds", "1", "--peers", "lax.grouped"]
    if full:
        yield [*own, "torch.conv2d,mine:conv,jax.grouped", "--attribute"]
        yield ["model", "mobilenet_v2", "--width", "0.25", "--size", "32"]


def test_no_command_runs_a_file_of_the_current_folder(tmp_path, full):
    folder = Folder(tmp_path, NAMES)
    weights = reference("torchvision.mobilenet_v3_small", width=0.5).state_dict()
    torch.save(weights, folder.path / "v3.pth")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "jaxdw").write_text(SCRIPT)
    chosen = list(commands(folder.path, full))
    done = folder.python(tmp_path / "bin" / "jaxdw", COMMANDS=json.dumps(chosen))
    assert done.returncode == 0, done.stderr
    codes = dict(zip(map(" ".join, chosen), json.loads(done.stdout.splitlines()[-1])))
    assert not any(codes.values()), f"{codes}\n{done.stderr}"
    assert done.stdout.count("mine:conv") > 3
    said = done.stderr.count("cannot load its compiled operators beside PyTorch")
    assert said == (0 if sys.modules["torchvision.extension"]._has_ops() else 1)


def test_python_m_bridge_runs_none_either(tmp_path):
    # what Python, and the hook of an editable install, import from there before the command can say a word
    find = "import importlib.util, sys; importlib.util.find_spec('bridge'); print(*sys.modules)"
    start = subprocess.run([sys.executable, "-c", find], capture_output=True, text=True)
    own = {"bridge", "sitecustomize", "usercustomize", "runpy", *start.stdout.split()}
    done = Folder(tmp_path, NAMES - own).python("-m", "bridge", "parity", "--shape", "x")
    assert done.returncode == 2 and done.stderr.startswith("jaxdw: `--shape` is 'x'")
    (tmp_path / "again").mkdir()
    folder = Folder(tmp_path / "again", NAMES - own - sys.stdlib_module_names)
    path = os.pathsep.join(["", ".", str(ROOT)])  # an empty part stands for the current folder
    done = folder.python("-m", "bridge", "parity", "--shape", "x", PYTHONPATH=path)
    assert done.returncode == 2 and done.stderr.startswith("jaxdw: `--shape` is 'x'")


def test_a_checkout_that_is_not_installed_runs_from_its_folder(tmp_path):
    folder = Folder(tmp_path, ["torch", "numpy"])
    for name in process.PACKAGES:
        shutil.copytree(ROOT / name, folder.path / name, ignore=shutil.ignore_patterns("__pycache__"))
    source = (folder.path / "jaxdw" / "__init__.py").read_text()
    (folder.path / "jaxdw" / "__init__.py").write_text(source.replace('__version__ = "', '__version__ = "8.'))
    # without the import hook of an editable install, which finds that one first
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if not type(f).__name__.startswith('ScikitBuild')]\n"
    )
    done = folder.python("-m", "bridge", "--version", PYTHONPATH=str(tmp_path / "site"))
    assert done.stdout.startswith("jaxdw 8."), done


def test_only_what_is_named_and_what_that_imports_comes_from_the_folder(tmp_path, monkeypatch):
    for name, text in {
        "own_module": "import own_sibling\ndef late():\n    import own_late\n    return own_late.value\n",
        "own_sibling": "",
        "own_late": "value = 7\n",
        "own_stranger": "",
        "json": "def mine(): pass\n",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert process.import_named("own_module").late() == 7
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("own_stranger")
    with pytest.raises(ValueError, match=r"json has no 'mine'; it is .*json.__init__\.py"):
        from bridge._implementations import implementation

        implementation("json:mine")
    for name in ("own_module", "own_sibling", "own_late"):
        del sys.modules[name]


def test_what_an_installed_module_lacks_is_not_taken_from_the_folder(tmp_path, monkeypatch):
    """As torchvision looks for `accimage`, where the user names a function of torchvision."""
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "site")
    text = "try:\n    import own_optional\nexcept ImportError:\n    own_optional = None\n"
    (tmp_path / "site" / "own_installed.py").write_text(text)
    (tmp_path / "own_optional.py").write_text("raise AssertionError('run from the folder')\n")
    monkeypatch.chdir(tmp_path)
    assert process.import_named("own_installed").own_optional is None
    del sys.modules["own_installed"]


@pytest.mark.parametrize("command", ["model", "census", "convert"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import sys\nsys.exit(0)", "cannot be imported: SystemExit: 0"),
        ("def f(: x", "cannot be imported: SyntaxError: invalid syntax (own.py, line 1)"),
        ("raise KeyError('mine')", "cannot be imported: KeyError: 'mine'"),
        ("def f():\n    raise KeyError('mine')", "KeyError in own.py, line 2: 'mine'"),
        ("def f():\n    import sys\n    sys.exit(0)", "SystemExit in own.py, line 3: 0"),
    ],
)
def test_errors_of_users_code_are_theirs(command, text, said, tmp_path, monkeypatch, capsys):
    """And end with 2: what it raises is no fault of jaxdw, and `sys.exit(0)` no verdict."""
    own = f"own_{uuid.uuid4().hex}"  # each is imported once
    (tmp_path / f"{own}.py").write_text(text)
    np.savez(tmp_path / "w.npz", w=np.ones(3))
    monkeypatch.chdir(tmp_path)
    words = {"convert": ["w.npz", "out.safetensors", "--like", f"{own}:f"]}.get(command, [f"{own}:f"])
    monkeypatch.setattr(sys, "argv", ["jaxdw", command, *words])
    with pytest.raises(SystemExit) as ended:
        cli.run()
    told = capsys.readouterr()
    words = " ".join((told.out + told.err).split()).replace(own, "own")
    assert ended.value.code == 2 and "bug in jaxdw" not in words
    assert said in words or (command == "census" and said.split()[0] in words), words


def test_a_process_of_its_own_has_a_limit_and_no_current_folder(monkeypatch):
    given = process._safe({"PYTHONPATH": os.pathsep.join(["", ".", "./", "/a", "b"]), "A": "1"})
    assert given == {"PYTHONPATH": f"/a{os.pathsep}b", "PYTHONSAFEPATH": "1", "A": "1"}
    with pytest.raises(TimeoutError, match=r"bridge.requirements took longer than 0\.001 s in a process of its own"):
        process.run_module("bridge.requirements", time_limit=0.001)
    for path in ("bridge", "jaxdw", "benchmarks", "examples"):
        for file in (ROOT / path).rglob("*.py"):
            starts = "sys.executable" in file.read_text() or "multiprocessing" in file.read_text()
            assert not starts or file.name == "process.py" or '"-P"' in file.read_text(), file


def test_only_operators_that_do_not_load_are_declared(monkeypatch):
    def fail(message):
        raise RuntimeError(message)

    extension = type(sys)("torchvision.extension")
    extension._has_ops = lambda: True
    monkeypatch.setitem(sys.modules, "torchvision.extension", extension)
    declared = []
    monkeypatch.setattr(libraries, "_declare", lambda: declared.append(True))
    for loads, message in (
        (True, "operator torchvision::nms does not exist"),
        (False, "operator torchvision::roi_align does not exist"),
        (False, "planted"),
    ):
        extension._has_ops = lambda loads=loads: loads
        with pytest.raises(RuntimeError, match=message):
            libraries.with_torchvision(lambda message=message: fail(message))
    assert not declared
    extension._has_ops = lambda: False
    answers = iter([lambda: fail("operator torchvision::nms does not exist"), lambda: 7])
    assert libraries.with_torchvision(lambda: next(answers)()) == 7 and declared
