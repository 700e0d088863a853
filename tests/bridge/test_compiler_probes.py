"""The probes of JAX's compiler: planted mistakes are named, a sound program is not, and the cache forgets in time."""

import json

import pytest
import typer.testing

from bridge import cli, compiler_probes
from tests.bridge import planted_probes as planted

EXPECTED = {
    "sound": ("", ""),
    "miscompiled": ("compiled, 6 of 6 elements are wrong, the first at (0, 0): 2, not 1.0; operation by", ""),
    "aborts": ("its process was ended by SIGABRT", ""),
    "busy": ("of processor time", ""),
    "wrong both ways": ("run operation by operation, 5 of 6 elements are wrong, the first at (0, 0): 0, not 1.0", ""),
    "of another shape": ("the shape is (), expected (2, 3)", ""),
    "refused": ("raised JaxRuntimeError: INTERNAL: no such fusion", ""),
    "without memory": ("", "RESOURCE_EXHAUSTED"),
    "of another interface": ("", "cannot import name 'ManualAxisType'"),
    "killed": ("", "was ended from outside, by SIGKILL"),
    "leaves": ("", "its process ended with exit code 3"),
    "sound to the end": ("", ""),
}


@pytest.fixture
def planted_probes(monkeypatch):
    monkeypatch.setattr(compiler_probes, "PROBES", planted.PROBES)
    monkeypatch.setattr(compiler_probes, "_MODULE", "tests.bridge.planted_probes")


@pytest.fixture
def started(tmp_path, monkeypatch):
    """An empty cache folder; the names that each child is asked for; a child that finds what is in `wrong`."""
    asked, wrong = [], {}

    def child(names, timeout):
        asked.append(names)
        outcomes = [{"name": name, "wrong": wrong.get(name, "")} for name in names if name != "--eager"]
        lines = [f"probe {json.dumps(each['name'])}\noutcome {json.dumps(each)}\n" for each in outcomes]
        return "".join(lines), "ended with exit code 0"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiler_probes, "_run_child", child)
    return asked, wrong, tmp_path / "jaxdw"


def test_each_planted_mistake_is_named_and_what_is_sound_is_not(planted_probes):
    outcomes = list(compiler_probes.examine(planted.PROBES))
    assert [outcome.name for outcome in outcomes] == [probe.name for probe in planted.PROBES]
    for outcome in outcomes:
        wrong, skipped = EXPECTED[outcome.name]
        assert wrong in outcome.wrong and bool(wrong) == bool(outcome.wrong), outcome
        assert skipped in outcome.skipped and bool(skipped) == bool(outcome.skipped), outcome
    avoidable = {outcome.name for outcome in outcomes if compiler_probes.avoidable(outcome)}
    assert avoidable == {name for name, (wrong, _) in EXPECTED.items() if wrong} - {"wrong both ways"}
    listed = "\n".join(compiler_probes.listing(outcomes))
    assert "2 of 8 programs" in listed and "known as jax-ml/jax#1: jaxlib 9" in listed
    assert "to avoid it: jaxlib 10" in listed and "not run: killed: its process" in listed


def test_a_child_that_takes_too_long_is_ended():
    _, ended = compiler_probes._run_child(["sound"], 0.1)  # it may have named its probe by then
    assert ended == "did not end in 0.1 s"


def test_a_child_that_dies_before_its_first_probe_finds_nothing(monkeypatch):
    monkeypatch.setattr(compiler_probes, "_run_child", lambda names, timeout: ("", "ended with exit code 1: no jax"))
    assert {o.skipped for o in compiler_probes.examine(planted.PROBES)} == {
        "its process ended with exit code 1: no jax"
    }


def test_a_crash_after_the_last_word_of_a_probe_is_its_own(monkeypatch):
    said = ['probe "a"', 'outcome {"name": "a"}', 'probe "b"', 'outcome {"name": "b"}']
    ends = iter([("\n".join(said), "was ended by SIGSEGV"), ('probe "c"\noutcome {"name": "c"}', "")])
    monkeypatch.setattr(compiler_probes, "_run_child", lambda names, timeout: next(ends))
    probes = [compiler_probes.Probe(name, planted._sound) for name in "abc"]
    assert [bool(outcome.wrong) for outcome in compiler_probes.examine(probes)] == [False, True, False]


def test_quick_findings_are_had_once_for_each_environment(started, monkeypatch):
    asked, wrong, folder = started
    wrong["gathers"] = "an element"
    first = compiler_probes.quick_findings()
    assert [finding.name for finding in first] == ["gathers"] and len(asked) == 1 and "--eager" not in asked[0]
    assert compiler_probes.quick_findings() == first and len(asked) == 1
    for name, value in (("XLA_FLAGS", "--xla_a=b"), ("JAX_PLATFORMS", "cuda"), ("JAX_ENABLE_X64", "1")):
        monkeypatch.setenv(name, value)
        compiler_probes.quick_findings()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99.1")
    compiler_probes.quick_findings()
    monkeypatch.setattr("bridge.environment.processor", lambda: "abacus")
    compiler_probes.quick_findings()
    assert len(asked) == 6 and len(list(folder.iterdir())) == 6


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"\xff\x00", b"[1]", b"{}", b'{"wrong": {"no such": ""}}', b"[" * 100_000, b"null"]
)
def test_a_damaged_cache_is_replaced(started, damage):
    asked, _, folder = started
    compiler_probes.quick_findings()
    (file,) = folder.iterdir()
    file.write_bytes(damage)
    assert compiler_probes.quick_findings() == [] and len(asked) == 2
    assert json.loads(file.read_text()) == {"wrong": {}} and compiler_probes.quick_findings() == [] and len(asked) == 2


def test_a_cache_that_cannot_be_written_is_no_error(started, tmp_path, monkeypatch):
    asked, _, folder = started
    folder.write_text("a file where the folder would be")
    assert compiler_probes.quick_findings() == compiler_probes.quick_findings() == [] and len(asked) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.chdir(tmp_path)
    assert compiler_probes.quick_findings() == [] and not (tmp_path / "relative").exists()


def test_what_could_not_run_is_not_cached(started, monkeypatch):
    monkeypatch.setattr(compiler_probes, "_run_child", lambda names, timeout: ("", "ended with exit code 1"))
    assert compiler_probes.quick_findings() == [] and not started[2].exists()


def test_parity_says_above_the_verdict_that_the_compiler_is_wrong(started, tmp_path):
    _, wrong, _ = started
    names = ("--implementations", "torch.conv2d,jax.taps", "--shape", "1x4x4x2")
    run = lambda *options: typer.testing.CliRunner().invoke(cli.app, ["parity", *names, *options]).output  # noqa: E731
    assert "compiler" not in run()
    for file in started[2].iterdir():
        file.unlink()
    probe = next(probe for probe in compiler_probes.PROBES if probe.quick and probe.issue)
    wrong[probe.name] = "1 of 2 elements"
    out = " ".join(run("--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")).split())
    said = (
        f"JAX's compiler gives wrong results here ({probe.issue}). A difference may come from the compiler. "
        f"To avoid it: {probe.avoid}"
    )
    assert said in out and out.index(said) < out.index("Verdict:")
    assert said in json.loads((tmp_path / "r.json").read_text())["environment"]["compiler"]
    assert f"({probe.issue})" in (tmp_path / "r.html").read_text()


def test_parity_without_jax_does_not_ask_its_compiler(started):
    typer.testing.CliRunner().invoke(cli.app, ["parity", "--implementations", "torch.conv2d,numpy.exact"])
    assert started[0] == []


def test_doctor_fails_only_for_what_is_not_tolerated(started):
    asked, wrong, _ = started
    run = lambda: typer.testing.CliRunner().invoke(cli.app, ["doctor", "--cases", "1"])  # noqa: E731
    tolerated = [probe for probe in compiler_probes.PROBES if probe.tolerated]
    wrong.update({probe.name: "an element" for probe in tolerated})
    done = run()
    assert done.exit_code == 0 and "wrong: " in done.output and all(probe.issue in done.output for probe in tolerated)
    assert [name for names in asked for name in names[1:]] == [probe.name for probe in compiler_probes.PROBES]
    assert all(names[0] == "--eager" for names in asked)
    wrong["gathers"] = "an element"
    assert run().exit_code == 1


def test_every_probe_has_a_name_of_its_own_and_a_known_bug_its_versions():
    names = [probe.name for probe in compiler_probes.PROBES]
    assert len(set(names)) == len(names)
    assert all(probe.affected for probe in compiler_probes.PROBES if probe.issue)
