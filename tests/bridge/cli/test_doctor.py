"""`jaxdw doctor`."""

from tests.bridge.cli.command import jaxdw


def test_doctor_prints_the_machine_and_its_self_test(monkeypatch):
    monkeypatch.setattr("bridge.compiler_probes.PROBES", ())  # they have tests of their own
    code, out, _ = jaxdw("doctor", "--cases", 5)
    text = " ".join(out.split())
    assert code == 0 and "torch.conv2d" in out and "5 random float32 convolutions" in text
    assert "With a channel multiplier of 2, where no equal bits are promised" in text
