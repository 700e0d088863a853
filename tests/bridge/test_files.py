"""Files that the commands read and write: only regular files, and never in place of somebody else's."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from bridge import files


def test_only_an_empty_file_or_one_of_the_same_kind_is_overwritten(tmp_path):
    path = tmp_path / "report"
    files.check_writable(path, "jaxdw.parity")
    for held in (b"", b'{\n  "schema": "jaxdw.parity/2",', b"<!doctype html>\n<!-- jaxdw.parity -->\n<html>"):
        path.write_bytes(held)
        files.check_writable(path, "jaxdw.parity")
    for held in (
        b'{"precious":1}',
        b"\x00\xff",
        b"\n",
        b'{"schema": "jaxdw.bundle/2"}',
        b'{"schema": "jaxdw.parity2/1"}',
        b'{"a": "jaxdw.parity/2"}',
        b"<!doctype html><p>jaxdw.parity",
    ):
        path.write_bytes(held)
        with pytest.raises(FileExistsError, match=r"is not a report of the kind jaxdw\.parity"):
            files.check_writable(path, "jaxdw.parity")


def test_only_sarif_of_this_package_is_overwritten(tmp_path):
    path = tmp_path / "log.sarif"
    own = {"$schema": "s", "version": "2.1.0", "runs": [{"tool": {"driver": {"name": "jaxdw", "version": "1"}}}]}
    for indent in (None, 2):
        path.write_text(json.dumps(own, indent=indent))
        files.check_writable(path, "jaxdw.sarif")
    for held in (json.dumps(own).replace("jaxdw", "other"), "def test_one(): pass", '{"schema": "jaxdw.sarif/1"}'):
        path.write_text(held)
        with pytest.raises(FileExistsError, match=r"is not a report of the kind jaxdw\.sarif"):
            files.check_writable(path, "jaxdw.sarif")


def not_regular(folder):
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(folder / "socket"))
    (folder / "folder").mkdir()
    (folder / "link").symlink_to("/dev/zero")
    return {"pipe": "a named pipe", "socket": "a socket", "folder": "a folder", "link": "a device"}


def test_only_regular_files_are_opened(tmp_path):
    for name, kind in not_regular(tmp_path).items():
        for read in (files.read_regular, files.read_json, files.read_npy):
            with pytest.raises(OSError, match=f"{name} is {kind}, expected a regular file"):
                read(tmp_path / name)
        with pytest.raises(OSError, match=r"is a folder|is not a regular file"):
            files.check_writable(tmp_path / name, "jaxdw.sarif")
    with pytest.raises(OSError, match="expected a regular file"):
        files.check_tree(tmp_path)


JSON = {
    "deep": (b"[" * 100_000, "recursion"),
    "twice": (b'{"a": 1, "a": 2}', "duplicate keys 'a'"),
    "NaN": (b'{"a": NaN}', "NaN is not a JSON number"),
    "infinite": (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
    "not UTF-8": (b'{"\xff": 1}', "codec can't decode"),
    "long number": (b"1" * 10_000, "4300 digits"),
    "cut": (b'{"a": ', "Expecting value"),
}


@pytest.mark.parametrize("name", JSON)
def test_json_that_is_not_sound_is_refused(name, tmp_path):
    content, message = JSON[name]
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"is not valid JSON: .*{message}"):
        files.read_json(tmp_path / "a.json")


def npy(header, data=b"", version=b"\x01\x00"):
    header = header + b" " * (-len(header) % 64) + b"\n"
    return b"\x93NUMPY" + version + len(header).to_bytes(2 if version[0] == 1 else 4, "little") + header + data


NPY = {
    "parentheses": npy(b"(" * 5000),
    "huge": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}"),
    "overflowing": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296, 4294967296)}"),
    "negative": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}", b"1234"),
    "no bytes an element": npy(b"{'descr': '<V0', 'fortran_order': False, 'shape': (9, 9)}"),
    "objects": npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"12345678"),
    "fields": npy(b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}", b"1234"),
    "text": npy(b"{'descr': '<U1', 'fortran_order': False, 'shape': (1,)}", b"1234"),
    "cut": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", b"1234567"),
    "long header": npy(b" " * 100_000, version=b"\x02\x00"),
    "archive": b"PK\x03\x04",
    "nothing": b"",
}


@pytest.mark.parametrize("name", NPY)
def test_an_npy_file_that_is_not_sound_is_refused(name, tmp_path):
    (tmp_path / "a.npy").write_bytes(NPY[name])
    with pytest.raises(ValueError, match=r"it is damaged|it holds|it claims|an archive of several"):
        files.read_npy(tmp_path / "a.npy")


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 4)])
def test_arrays_are_read_as_numpy_reads_them(order, shape, tmp_path):
    array = np.asarray(np.random.default_rng(0).standard_normal(shape), order=order)
    np.save(tmp_path / "a.npy", array)
    found = files.read_npy(tmp_path / "a.npy")
    assert found.dtype == array.dtype and found.shape == shape and (found == array).all()


WRITER = """
import sys
from pathlib import Path
from bridge import files
from bridge._census import record
if sys.argv[2] == "no fcntl":
    files.fcntl = None
settings = record.CensusSettings(
    size=None, batch=1, seed=0, pretrained=False, weights=None, implementations=("a", "b"), explain=False
)
for number in range(60):
    record.append_record(Path(sys.argv[1]), record.CensusRecord(
        model=f"{sys.argv[3]} {number}", settings=settings, environment={"long": "x" * 20_000}, seconds=1.0,
        verdict=None, layers=[], idle=[], passed_over=[], error="",
    ))
"""


@pytest.mark.parametrize("lock", ["fcntl", "no fcntl"])
def test_two_writers_lose_no_record(lock, tmp_path):
    from bridge._census.record import read_records

    path = tmp_path / "census.jsonl"
    command = [sys.executable, "-c", WRITER, str(path), lock]
    writers = [subprocess.Popen([*command, name], stderr=subprocess.PIPE) for name in "ab"]
    for writer in writers:
        _, error = writer.communicate(timeout=120)
        assert writer.returncode == 0, error
    assert {each.model for each in read_records(path)} == {f"{name} {number}" for name in "ab" for number in range(60)}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("held", [b'{"precious":1}', b'{"precious":1}\n', b"\x89PNG\r\n\x1a\n", b"\x00" * 99])
def test_results_are_never_added_to_a_foreign_file(held, tmp_path):
    from bridge._census import record

    path = tmp_path / "r.json"
    path.write_bytes(held)
    settings = record.CensusSettings(
        size=None, batch=1, seed=0, pretrained=False, weights=None, implementations=("a", "b"), explain=False
    )
    empty = {"layers": [], "idle": [], "passed_over": [], "error": "", "environment": {}}
    added = record.CensusRecord(model="m", settings=settings, seconds=1.0, verdict=None, **empty)
    for act in (record.read_records, lambda path: record.append_record(path, added)):
        with pytest.raises(ValueError, match=r"something else|no result of a census"):
            act(path)
    assert path.read_bytes() == held
