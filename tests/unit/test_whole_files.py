"""Files that are replaced as a whole: the old one stays until the new one is complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.host.whole_files import replacing


def test_a_file_has_its_old_content_until_the_new_one_is_complete(tmp_path: Path) -> None:
    file = tmp_path / "made" / "facts"
    with replacing(file) as draft:
        draft.write_text("old")
        assert not file.exists()
    with replacing(file) as draft:
        draft.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert list(file.parent.iterdir()) == [file]


def test_what_is_not_completed_leaves_no_trace(tmp_path: Path) -> None:
    file = tmp_path / "facts"
    file.write_text("old")

    def write_a_part() -> None:
        with replacing(file) as draft:
            draft.write_text("ne")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write_a_part()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
