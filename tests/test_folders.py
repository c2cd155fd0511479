"""Files are replaced whole, and may be read by whoever could read any other file of theirs."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from finemoe.errors import ConfigError
from finemoe.system import refuse_unwritable, replace_file


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    for content in (b"first", b"second, longer", b"3"):
        replace_file(path, content)
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_what_can_not_be_written_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    replace_file(path, b"kept")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"lost")
    assert path.read_bytes() == b"kept"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="no such modes")
def test_its_mode_is_that_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    replace_file(tmp_path / "file", b"")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_paths_that_could_not_be_written_are_refused_and_no_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    refuse_unwritable("--out", tmp_path / "file")
    monkeypatch.chdir(tmp_path)
    refuse_unwritable("--out", Path("new"))
    for path, reason in (
        (tmp_path / "no" / "file", "there is no folder .*no; make it"),
        (tmp_path / "file" / "below", "there is no folder .*file"),
        (tmp_path, "is a folder; give a file in it"),
    ):
        with pytest.raises(ConfigError, match=f"^--out: .*{reason}"):
            refuse_unwritable("--out", path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ConfigError, match=r"^--out: .*new can't be written \(no permission in"):
        refuse_unwritable("--out", tmp_path / "new")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
