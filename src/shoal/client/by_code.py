"""Opens a model by an invite code: it names the swarm, whose members give the config, the tokenizer and the head."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from shoal.client.options.client_options import ClientOptions
from shoal.client.runtime import Runtime
from shoal.client.shared_network import join_shared
from shoal.errors import UserError
from shoal.joining.arrival import files_from_members, invitation_of, peers_of
from shoal.joining.invite_code import InviteCode
from shoal.model.weights.checkpoint import Checkpoint
from shoal.model.weights.hub import DownloadBar
from shoal.net.transport import Node


def open_by_code(code: InviteCode, options: ClientOptions) -> tuple[Checkpoint, ClientOptions, Runtime, Node]:
    """The model of a code's swarm, the options completed by how the swarm is joined, and access to it.

    The caller closes the runtime. Raises `BootstrapFailed` if no member answers, `SwarmError`, `CheckpointError` if
    members do not give what is needed, and `UserError`.
    """
    with ThreadPoolExecutor(1) as outside:  # of the caller's thread, which may run an event loop
        peers = outside.submit(asyncio.run, peers_of(code)).result()
    options = options.by_code(code, peers)
    runtime, node = join_shared(options.network)
    try:
        invitation = runtime.run(invitation_of(code.digest, node, options.initial_peers))
        wanted = options.model
        files = runtime.run(files_from_members(node, invitation, report=FetchBar()))
        if files is not None:
            checkpoint = Checkpoint.of(files, allow_uncertified=wanted.allow_uncertified)
        else:
            checkpoint = Checkpoint.open(
                invitation.hub,
                revision=invitation.revision,
                token=wanted.token,
                cache_dir=wanted.cache_dir,
                allow_uncertified=wanted.allow_uncertified,
                local_files_only=wanted.local_files_only,
            )
        if checkpoint.fingerprint != invitation.fingerprint:
            raise UserError("members gave other weights than the invitation names", hint="ask for a fresh code")
        return checkpoint, options, runtime, node
    except BaseException:
        runtime.close()
        raise


class FetchBar:
    """Shows on a terminal, or in the log, how much of what this machine fetches from members has come.

    It is called with the bytes that have come and those that are wanted, of one fetch after another.
    """

    def __init__(self) -> None:
        self._bar: DownloadBar | None = None
        self._shown = 0

    def __call__(self, come: int, wanted: int) -> None:
        if come == 0:  # another fetch begins
            self._close()
            if wanted:
                self._bar = DownloadBar(
                    total=wanted, unit="B", unit_scale=True, desc="the head from members", disable=None
                )
        elif self._bar is not None:
            self._bar.update(come - self._shown)
            self._shown = come
            if come >= wanted:
                self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._shown = None, 0
