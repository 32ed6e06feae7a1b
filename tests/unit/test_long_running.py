"""Identities of processes that run until they are stopped, and how they end."""

from __future__ import annotations

import signal as signals
import subprocess
import sys

import pytest

from shoal.cli.service.long_running import identity_file, run_until_signalled
from shoal.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    return tmp_path


def test_processes_that_run_together_have_different_identities_and_a_later_one_gets_the_first_again(cache):
    with identity_file(None, kind="serve") as first, identity_file(None, kind="serve") as second:
        assert (first.name, second.name) == ("serve-0", "serve-1")
        assert first.parent == cache / "identities"
    with identity_file(None, kind="serve") as later:
        assert later == first


def test_each_kind_of_process_has_identities_of_its_own(cache):
    with identity_file(None, kind="serve") as server, identity_file(None, kind="dht") as bootstrap:
        assert (server.name, bootstrap.name) == ("serve-0", "dht-0")


def test_a_chosen_identity_is_used_by_one_process_at_a_time(cache):
    with (
        identity_file(cache / "mine", kind="serve") as path,
        pytest.raises(UserError, match="another process uses the identity") as caught,
        identity_file(path, kind="dht"),
    ):
        pass
    assert "name another file" in caught.value.hint
    with identity_file(path, kind="serve") as again:
        assert again == path


def test_an_identity_file_that_cannot_be_written_is_an_error(cache):
    (cache / "file").touch()
    with (
        pytest.raises(UserError, match=r"the identity file .* cannot be written"),
        identity_file(cache / "file" / "x", kind="serve"),
    ):
        pass


SECONDS = 60.0
"""The limit for a process that never ends."""

SCRIPT = """
import asyncio, atexit, os, signal, sys, threading
from concurrent.futures import ThreadPoolExecutor
from shoal.cli.service.long_running import run_until_signalled

never = threading.Event()
atexit.register(never.wait)
loading = ThreadPoolExecutor().submit(never.wait)

async def work():
    print("serving")
    try:
        os.kill(os.getpid(), signal.{signal})
        await asyncio.wrap_future(loading)
    finally:
        await asyncio.sleep(0)
        print("cleaned up")

run_until_signalled(work())
"""


@pytest.mark.parametrize("signal", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_process_after_its_cleanup_without_waiting_for_its_threads(signal: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(signal=signal)], capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["serving", "cleaned up"]
    assert done.stderr.splitlines() == ["leaving the swarm; a second Ctrl-C quits immediately"]


def test_work_that_ends_by_itself_leaves_the_signals_as_they_were() -> None:
    before = [signals.getsignal(number) for number in (signals.SIGINT, signals.SIGTERM)]

    async def fail() -> None:
        raise UserError("the port is taken")

    with pytest.raises(UserError, match="the port is taken"):
        run_until_signalled(fail())
    assert [signals.getsignal(number) for number in (signals.SIGINT, signals.SIGTERM)] == before
