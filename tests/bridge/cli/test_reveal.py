"""`jaxdw reveal`."""

import json
import re

import numpy as np

from tests.bridge.cli.command import jaxdw


def test_reveal_shows_orders_and_where_they_first_diverge(tmp_path):
    path = tmp_path / "orders.json"
    code, out, _ = jaxdw("reveal", "torch.conv2d", "torch.unfold_matmul", "--json", path)
    assert code == 0
    assert "F[8, F[7, F[6, F[5, F[4, F[3, F[2, F[1, 0]]]]]]]]" in out
    report = json.loads(path.read_text())
    assert [order["implementation"] for order in report["orders"]] == ["torch.conv2d", "torch.unfold_matmul"]
    assert report["divergences"][0] in " ".join(out.split())
    assert re.search(
        r"torch.conv2d and torch.unfold_matmul first diverge at the second product, on 54 of 150 elements: "
        r"torch.conv2d (fuses multiply and add \(one rounding\)|rounds the product first \(two roundings\)); ",
        report["divergences"][0],
    )


def test_files_give_the_geometry_in_either_layout(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((1, 3, 5, 4), np.float32))
    np.save(tmp_path / "w.npy", np.ones((6, 1, 2, 2), np.float32))
    files = ("--input", tmp_path / "x.npy", "--kernel", tmp_path / "w.npy", "--layout", "channels_first")
    code, out, _ = jaxdw("reveal", "torch.conv2d", *files)
    assert code == 0 and "input 1x5x4x3, kernel 2x2" in out and "multiplier 2" in out
