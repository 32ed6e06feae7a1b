"""A process as systemd runs it: options from a file, its states over a socket, and SIGTERM at the end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

SECONDS = 120.0
"""The limit for a wait. A test that reaches it fails."""


def test_a_service_takes_its_options_from_a_file_and_says_when_it_is_ready_and_when_it_stops(tmp_path: Path) -> None:
    config = tmp_path / "dht.toml"
    config.write_text(f'host = "127.0.0.1"\nidentity = "{tmp_path}/identity"\n')
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(SECONDS)
        environment = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        program = [sys.executable, "-m", "shoal", "dht", "--config", str(config)]
        with subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as service:
            assert systemd.recv(4096) == b"STATUS=Starting the network"
            assert systemd.recv(4096).startswith(b"READY=1\nSTATUS=")
            service.send_signal(signal.SIGTERM)
            assert systemd.recv(4096).startswith(b"STOPPING=1\n")
            out, _ = service.communicate(timeout=SECONDS)
    assert service.returncode == 0
    assert b"/ip4/127.0.0.1/tcp/" in out
    assert (tmp_path / "identity").exists()
