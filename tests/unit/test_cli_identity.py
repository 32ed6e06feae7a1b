"""Which key a process of this machine is known by."""

from __future__ import annotations

import pytest

from shoal.cli.identity import identity_file
from shoal.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    return tmp_path


def test_two_processes_at_once_have_different_identities_and_a_later_one_has_the_first_again(cache):
    with identity_file(None, kind="serve") as first, identity_file(None, kind="serve") as second:
        assert (first.name, second.name) == ("serve-0", "serve-1")
        assert first.parent == cache / "identities"
    with identity_file(None, kind="serve") as later:
        assert later == first


def test_kinds_of_processes_have_their_own(cache):
    with identity_file(None, kind="serve") as server, identity_file(None, kind="dht") as bootstrap:
        assert (server.name, bootstrap.name) == ("serve-0", "dht-0")


def test_a_chosen_identity_serves_one_process_at_a_time(cache):
    with (
        identity_file(cache / "mine", kind="serve") as path,
        pytest.raises(UserError, match="another process uses the identity") as caught,
        identity_file(path, kind="dht"),
    ):
        pass
    assert "name another file" in caught.value.hint
    with identity_file(path, kind="serve") as again:
        assert again == path


def test_a_place_that_cannot_be_written_to_is_an_error_with_a_hint(cache):
    (cache / "file").touch()
    with pytest.raises(UserError, match="no identity can be kept"), identity_file(cache / "file" / "x", kind="serve"):
        pass
