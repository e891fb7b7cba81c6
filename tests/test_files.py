"""Files that users name: only regular ones, replaced whole, and one line for everything that can be wrong."""

import os
import socket
import stat

import pytest

from llorch_jax.errors import LlorchError
from llorch_jax.files import check_regular, exists, read_bytes, read_json, read_text, replace_file, shown


class OwnError(LlorchError):
    """The class that a caller passes."""


def kinds(folder):
    """Paths that are no regular files, each with what the message must say."""
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "socket"))  # a path of a hundred bytes at most
    (folder / "loop").symlink_to("loop")
    (folder / "file").write_text("old")
    return {
        folder / "folder": "expected a regular file, got a directory",
        folder / "pipe": "expected a regular file, got a pipe",
        folder / "socket": "expected a regular file, got a socket|No such device",
        "/dev/zero": "expected a regular file, got a device",
        folder / "loop": "symbolic links",
        folder / "file" / "below": "Not a directory",
        folder / ("x" * 300): "File name too long",
        "nul\0": "no file can have this name",
        "lone\ud800": "no file can have this name",
    }


def write_new(path):
    replace_file(path, lambda file: file.write(b"new"), OwnError)


def test_whatever_is_no_regular_file_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, message in {**kinds(tmp_path), tmp_path / "missing": "No such file"}.items():
        for read in (read_bytes, read_text, read_json, check_regular):
            with pytest.raises(OwnError, match=message) as caught:
                read(path, OwnError)
            assert str(caught.value).isprintable()
            assert len(str(caught.value)) < 500


def test_whatever_is_no_regular_file_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = kinds(tmp_path)
    before = {path: os.lstat(path).st_mode for path in paths if os.path.lexists(str(path).replace("\0", ""))}
    for path, message in {**paths, tmp_path / "no" / "parent": "No such file"}.items():
        with pytest.raises(OwnError, match=message):
            write_new(path)
    assert {path: os.lstat(path).st_mode for path in before} == before
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "loop", "pipe", "socket"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_device_is_never_replaced():
    before = os.stat("/dev/full")
    with pytest.raises(OwnError, match="/dev/full: expected a regular file, got a device"):
        write_new("/dev/full")
    after = os.stat("/dev/full")
    assert stat.S_ISCHR(after.st_mode)
    assert (after.st_ino, after.st_rdev) == (before.st_ino, before.st_rdev)


def test_a_replaced_file_keeps_its_permissions(tmp_path):
    path = tmp_path / "private"
    path.write_text("old")
    path.chmod(0o600)
    write_new(path)
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_longest_name_can_be_replaced(tmp_path):
    write_new(tmp_path / ("x" * 255))
    assert os.listdir(tmp_path) == ["x" * 255]


@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_stays_one(tmp_path, there):
    target = tmp_path / "target"
    if there:
        target.write_text("old")
    (tmp_path / "link").symlink_to(target)
    write_new(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert target.read_text() == "new"


@pytest.mark.parametrize(
    ("failure", "reported"),
    [(OSError(28, "No space left on device"), OwnError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path, failure, reported):
    (tmp_path / "file").write_text("old")

    def write(file):
        file.write(b"half")
        raise failure

    with pytest.raises(reported):
        replace_file(tmp_path / "file", write, OwnError)
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected JSON"),
        (b"{", "expected JSON"),
        (b"\xff", "expected JSON"),
        (b"[" * 100_000, "expected JSON, got something else .nested too deeply"),
        (b'{"a":' * 100_000, "expected JSON, got something else .nested too deeply"),
        (b"1" * 5000, "expected JSON"),
    ],
)
def test_what_is_no_json_is_one_line(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(OwnError, match=message) as caught:
        read_json(tmp_path / "file", OwnError, "download it again")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("; download it again")


def test_the_callers_own_errors_pass_through(tmp_path):
    def fail(file):
        raise ValueError("of the caller")

    with pytest.raises(ValueError, match="of the caller"):
        replace_file(tmp_path / "file", fail, OwnError)
    assert not os.listdir(tmp_path)


def test_existence(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert exists(tmp_path / "file", OwnError)
    assert exists(tmp_path, OwnError)
    for missing in ("missing", "dangling", "file/below"):
        assert not exists(tmp_path / missing, OwnError)
    for path in ("nul\0", "x" * 300):
        with pytest.raises(OwnError, match="cannot be read"):
            exists(path, OwnError)


def test_paths_are_shown_in_one_printable_line():
    assert shown("models/漢字") == "models/漢字"
    assert shown("a\nb\ud800") == r"a\nb\ud800"
    assert shown("x" * 1000) == "x" * 100 + "..." + "x" * 100
