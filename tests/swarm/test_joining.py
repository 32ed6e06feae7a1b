"""A machine that joins gets its weights from members, some of which lie, stall or vanish, in virtual time."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import pytest
import torch

from shoal.errors import CheckpointError, SwarmError
from shoal.joining.arrival import files_from_members, invitation_of
from shoal.joining.invitation import Invitation
from shoal.joining.piece_fetcher import PATIENCE_SECONDS, STREAMS_PER_MEMBER, FetchFromThreads, PieceFetcher
from shoal.joining.requests import NoAnswer, member
from shoal.model.weights.pieces.manifest import PIECE_BYTES, ListedFile, Manifest
from shoal.model.weights.pieces.piece_store import FolderPieces, PieceSource, PieceStore
from shoal.net.memory import MemoryNetwork
from shoal.net.transport import Node, Stream
from shoal.net.wire import codec
from shoal.peers import ModelInfo
from shoal.policy.network.uploads import GRACE_SECONDS, SEND_SECONDS
from shoal.protocol import REQUEST_KINDS, Content, GetHeld, GetPiece
from shoal.server.rpc.pushing.push_service import PushService
from shoal.server.rpc.streams import Handler
from shoal.server.rpc.weights_service import WeightsService
from tests.server_infos import info

from . import virtual_time

T = TypeVar("T")

MODEL = ModelInfo(key="llama-12x64-0a1b2c3d", name="stories", family="llama", num_blocks=12)
MIB = 1 << 20
SIZES = {"config.json": 700, "model-1.safetensors": 9 * MIB, "model-2.safetensors": 5 * MIB, "tokenizer.json": 0}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> FolderPieces:
    """A folder with all files of a model: six pieces."""
    folder, rng = tmp_path_factory.mktemp("copy"), random.Random(0)
    listed, digests = [], []
    for name, size in sorted(SIZES.items()):
        content = rng.randbytes(size)
        (folder / name).write_bytes(content)
        listed.append(ListedFile(name, size, hashlib.sha256(content).hexdigest()))
        digests += [hashlib.sha256(content[at : at + PIECE_BYTES]).digest() for at in range(0, size, PIECE_BYTES)]
    return FolderPieces(Manifest(tuple(listed), tuple(digests)), folder)


def invitation_to(source: PieceSource) -> Invitation:
    return Invitation("owner/stories", MODEL.key, "f", "float32", "none", manifest=source.manifest.name)


class Swarm:
    """Members on a network in memory, and a machine that joins."""

    def __init__(self) -> None:
        self.network = MemoryNetwork()
        self.me = self.network.node("me", is_client=True)

    async def add(
        self,
        name: str,
        source: PieceSource | None,
        *,
        invitation: Invitation | None = None,
        upload_limit: float | None = None,
        answer: Callable[[Stream], Coroutine[Any, Any, None]] | None = None,
    ) -> WeightsService:
        """A server that gives what the source has, unless it has its own way to answer."""
        node, service = self.network.node(name), WeightsService(upload_limit=upload_limit)
        if source is not None:
            service.offer(invitation or invitation_to(source), source)
        await node.transport.listen(answer or handler_of(node, service))
        await node.directory.announce(MODEL, info(name), lifetime=300)
        return service

    async def fetch(self, store: PieceStore, pieces: Iterable[int] | None = None, **options: Any) -> None:
        wanted = range(store.manifest.num_pieces) if pieces is None else pieces
        await PieceFetcher(self.me, MODEL, store, **options).fetch(list(wanted))


def handler_of(node: Node, service: WeightsService) -> Handler:
    engine = SimpleNamespace(
        num_passes=0,
        queue_length=0,
        cache_tokens_left=0,
        passes=SimpleNamespace(release=lambda peer: None),
        validator=SimpleNamespace(check_declared=lambda message: None),
    )
    return Handler(cast(Any, engine), PushService(node.transport), idle_seconds=300.0, weights=service)


def run(scene: Callable[[Swarm], Coroutine[Any, Any, T]]) -> T:
    async def play() -> T:
        swarm = Swarm()
        try:
            return await scene(swarm)
        finally:
            await swarm.network.close()

    return virtual_time.run(play())


def same_files(store: PieceStore, copy: FolderPieces) -> bool:
    return all((store.folder / name).read_bytes() == (copy.folder / name).read_bytes() for name in SIZES)


class Part:
    """A member that has only some pieces."""

    def __init__(self, whole: FolderPieces, pieces: Iterable[int]) -> None:
        self.manifest = whole.manifest
        self._whole = whole
        self._pieces = set(pieces)
        self.given: list[int] = []

    def holds(self, piece: int) -> bool:
        return piece in self._pieces

    def held(self) -> bytes:
        return bytes([sum(1 << piece for piece in self._pieces)])

    def read(self, piece: int) -> bytes:
        self.given.append(piece)
        return self._whole.read(piece)


class Liar(Part):
    """A member that says it has everything, and sends something else."""

    def read(self, piece: int) -> bytes:
        content = bytearray(super().read(piece))
        content[len(content) // 2] ^= 1
        return bytes(content)


def test_pieces_come_from_several_members_at_once_each_from_one_that_has_it(copy: FolderPieces, tmp_path: Path) -> None:
    first, second, store = Part(copy, [0, 1, 2, 3]), Part(copy, [3, 4, 5]), PieceStore(copy.manifest, tmp_path)
    seen: list[tuple[int, int]] = []

    async def scene(swarm: Swarm) -> None:
        swarm.network.limit("first", up=1.0 * MIB)
        swarm.network.limit("second", up=1.0 * MIB)
        await swarm.add("first", first)
        await swarm.add("second", second)
        await swarm.fetch(store, report=lambda come, wanted: seen.append((come, wanted)))

    run(scene)
    assert same_files(store, copy)
    assert {0, 1, 2} <= set(first.given) <= {0, 1, 2, 3}
    assert {4, 5} <= set(second.given) <= {3, 4, 5}
    total = sum(SIZES.values())
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert [come for come, _ in seen] == sorted(come for come, _ in seen)


def test_a_member_that_sends_other_bytes_is_named_and_nothing_of_them_is_kept(
    copy: FolderPieces, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    liar, store = Liar(copy, range(6)), PieceStore(copy.manifest, tmp_path)

    async def scene(swarm: Swarm) -> None:
        swarm.network.delay(0.01, "honest")  # the liar is nearer, and asked first
        await swarm.add("liar", liar)
        await swarm.add("honest", Part(copy, range(6)))
        await swarm.fetch(store)

    with caplog.at_level(logging.WARNING):
        run(scene)
    assert same_files(store, copy)
    assert len(liar.given) <= STREAMS_PER_MEMBER
    assert [record.getMessage() for record in caplog.records] == [
        "liar sent a wrong piece of the weights: it is not asked again"
    ]


async def _says_it_has_all_and_then(stream: Stream, react: Callable[[Stream, int], Coroutine[Any, Any, None]]) -> None:
    while True:
        message, _ = await codec.receive(stream, REQUEST_KINDS)
        match message:
            case GetHeld():
                await codec.send(stream, Content(), {"content": torch.full((1,), 0x3F, dtype=torch.uint8)})
            case GetPiece():
                await react(stream, message.piece)
            case _:
                return


async def _breaks_off(stream: Stream, piece: int) -> None:
    await stream.close()


async def _sends_too_much(stream: Stream, piece: int) -> None:
    await codec.send(stream, Content(), {"content": torch.zeros(2 * PIECE_BYTES, dtype=torch.uint8)})


async def _sends_too_little(stream: Stream, piece: int) -> None:
    await codec.send(stream, Content(), {"content": torch.zeros(16, dtype=torch.uint8)})


async def _sends_nothing(stream: Stream, piece: int) -> None:
    await codec.send(stream, Content())


async def _sends_numbers(stream: Stream, piece: int) -> None:
    await codec.send(stream, Content(), {"content": torch.zeros(16, dtype=torch.bfloat16)})


async def _sends_no_row(stream: Stream, piece: int) -> None:
    await codec.send(stream, Content(), {"content": torch.tensor(7, dtype=torch.uint8)})


REACTIONS = [_breaks_off, _sends_too_much, _sends_too_little, _sends_nothing, _sends_numbers, _sends_no_row]


@pytest.mark.parametrize("react", REACTIONS)
def test_members_that_misbehave_do_not_keep_a_machine_from_joining(
    copy: FolderPieces, tmp_path: Path, react: Callable[[Stream, int], Coroutine[Any, Any, None]]
) -> None:
    store = PieceStore(copy.manifest, tmp_path)

    async def scene(swarm: Swarm) -> None:
        swarm.network.delay(0.01, "honest")
        await swarm.add("bad", None, answer=lambda stream: _says_it_has_all_and_then(stream, react))
        await swarm.add("honest", Part(copy, range(6)))
        await swarm.fetch(store)

    run(scene)
    assert same_files(store, copy)


def test_an_endless_trickle_costs_no_more_than_the_time_of_the_others(copy: FolderPieces, tmp_path: Path) -> None:
    store = PieceStore(copy.manifest, tmp_path)

    async def scene(swarm: Swarm) -> float:
        swarm.network.limit("slow", up=100.0)  # a piece would take twelve hours
        swarm.network.limit("honest", up=10.0 * MIB)
        await swarm.add("slow", Part(copy, range(6)))
        await swarm.add("honest", Part(copy, range(6)))
        await swarm.fetch(store)
        return (await _now()) - 0.0

    assert run(scene) < 20.0
    assert same_files(store, copy)


def test_many_members_that_stall_delay_a_machine_and_do_not_stop_it(copy: FolderPieces, tmp_path: Path) -> None:
    store = PieceStore(copy.manifest, tmp_path)

    async def stalls(stream: Stream, piece: int) -> None:
        await asyncio.Event().wait()

    async def scene(swarm: Swarm) -> float:
        swarm.network.delay(0.01, "honest")
        for number in range(8):
            await swarm.add(f"stalling {number}", None, answer=lambda each: _says_it_has_all_and_then(each, stalls))
        await swarm.add("honest", Part(copy, range(6)))
        await swarm.fetch(store)
        return await _now()

    assert run(scene) < 60.0
    assert same_files(store, copy)


def test_silent_members_do_not_hide_the_list_of_pieces(
    copy: FolderPieces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))

    async def silent(stream: Stream) -> None:
        await asyncio.Event().wait()

    async def scene(swarm: Swarm) -> float:
        for number in range(8):
            await swarm.add(f"a silent {number}", None, answer=silent)
        await swarm.add("honest", Part(copy, range(6)))
        await files_from_members(swarm.me, invitation_to(copy))
        return await _now()

    assert run(scene) < 60.0


def test_machines_that_join_together_wait_for_each_other(copy: FolderPieces, tmp_path: Path) -> None:
    async def scene(swarm: Swarm) -> float:
        await swarm.add("member", Part(copy, range(6)), upload_limit=0.3 * MIB)
        stores = [PieceStore(copy.manifest, tmp_path / str(number)) for number in range(6)]
        async with asyncio.TaskGroup() as group:
            for number, store in enumerate(stores):
                joining = swarm.network.node(f"joining {number}", is_client=True)
                group.create_task(PieceFetcher(joining, MODEL, store).fetch(range(6)))
        assert all(same_files(store, copy) for store in stores)
        return await _now()

    at_least = 6 * sum(SIZES.values()) / (0.3 * MIB)
    assert at_least - 30 < run(scene) < 1.5 * at_least + 60


async def _now() -> float:
    return asyncio.get_running_loop().time()


def test_a_member_that_dies_in_the_middle_is_replaced_and_nothing_comes_twice(
    copy: FolderPieces, tmp_path: Path
) -> None:
    store, rest, missing = PieceStore(copy.manifest, tmp_path), Part(copy, range(6)), list[int]()

    async def scene(swarm: Swarm) -> None:
        dying = Part(copy, range(6))
        await swarm.add("dying", dying)
        come = 0

        def report(now: int, wanted: int) -> None:
            nonlocal come
            come += now > 0
            if come == 3:
                swarm.network.kill("dying")

        with pytest.raises(CheckpointError, match=r"no member of the swarm gives [23] pieces"):
            await swarm.fetch(store, report=report, patience=10.0)
        store.save()
        missing.extend(store.missing(range(6)))
        await swarm.add("other", rest)
        await swarm.fetch(PieceStore(copy.manifest, tmp_path))

    run(scene)
    assert same_files(store, copy)
    assert missing
    assert sorted(rest.given) == missing


def test_a_machine_waits_for_members_that_have_what_it_needs(
    copy: FolderPieces, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = PieceStore(copy.manifest, tmp_path)

    async def scene(swarm: Swarm) -> float:
        async def come_later() -> None:
            await asyncio.sleep(60)
            await swarm.add("late", Part(copy, range(6)))

        async with asyncio.TaskGroup() as group:
            group.create_task(come_later())
            group.create_task(swarm.fetch(store))
        return await _now()

    with caplog.at_level(logging.WARNING):
        assert 60 <= run(scene) < 70
    assert same_files(store, copy)
    assert "waiting for members that have 6 pieces of the weights" in caplog.records[0].getMessage()


def test_it_gives_up_when_nothing_comes_for_long(copy: FolderPieces, tmp_path: Path) -> None:
    async def scene(swarm: Swarm) -> float:
        await swarm.add("empty", Part(copy, []))
        with pytest.raises(CheckpointError, match="gives 6 pieces"):
            await swarm.fetch(PieceStore(copy.manifest, tmp_path))
        return await _now()

    assert PATIENCE_SECONDS < run(scene) < PATIENCE_SECONDS + 30


def test_uploads_keep_to_their_limit_and_can_be_refused(copy: FolderPieces, tmp_path: Path) -> None:
    async def scene(swarm: Swarm) -> float:
        await swarm.add("refusing", Part(copy, range(6)), upload_limit=0)
        await swarm.add("giving", Part(copy, range(6)), upload_limit=1.0 * MIB)
        await swarm.fetch(PieceStore(copy.manifest, tmp_path))
        return await _now()

    assert 14 - 5 - 1 <= run(scene) <= 16  # of 14 MiB, the last piece begins in time, and a second is free


def test_a_server_gives_no_other_bytes_than_pieces_that_it_has(copy: FolderPieces) -> None:
    async def scene(swarm: Swarm) -> list[str]:
        await swarm.add("member", Part(copy, [0]))
        reasons = []
        other = replace(copy.manifest, digests=(*copy.manifest.digests[:-1], bytes(32)))
        for manifest, piece in ((copy.manifest, 1), (other, 0)):
            async with member(swarm.me.transport, "member") as giver:
                with pytest.raises(NoAnswer) as refused:
                    await giver.piece(manifest, piece)
                reasons.append(str(refused.value))
        for number in (6, 1 << 17):
            stream = await swarm.me.transport.open("member")
            await codec.send(stream, GetPiece(manifest=copy.manifest.name, piece=number))
            answer, _ = await codec.receive(stream)
            reasons.append(answer.reason)  # type: ignore[union-attr]
            await stream.close()
        return reasons

    no_piece = "this server does not have that piece"
    assert run(scene) == [no_piece, "this server does not have these weights", no_piece, no_piece]


def test_the_invitation_is_the_one_that_the_code_names_whoever_gives_it(copy: FolderPieces) -> None:
    right = invitation_to(copy)
    wrong = replace(right, dtype="float16")

    async def scene(swarm: Swarm) -> tuple[Invitation, str]:
        async def lies(stream: Stream) -> None:
            from shoal.protocol import InvitationText

            await codec.receive(stream, REQUEST_KINDS)
            await codec.send(stream, InvitationText(text=wrong.text))

        await swarm.add("liar", None, answer=lies)
        with pytest.raises(SwarmError, match="no member of this swarm knows this invitation"):
            await invitation_of(right.digest, swarm.me, ["/x/p2p/liar"])
        await swarm.add("honest", copy, invitation=right)
        return await invitation_of(right.digest, swarm.me, ["/x/p2p/liar"]), wrong.digest

    found, other = run(scene)
    assert found == right
    assert other != right.digest


def test_the_list_of_pieces_is_taken_from_the_first_member_that_has_the_right_one(
    copy: FolderPieces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))

    async def scene(swarm: Swarm) -> list[str]:
        async def lies(stream: Stream) -> None:
            await codec.receive(stream, REQUEST_KINDS)
            await codec.send(stream, Content(), {"content": torch.zeros(1000, dtype=torch.uint8)})

        await swarm.add("a liar", None, answer=lies)
        await swarm.add("honest", Part(copy, range(6)))
        files = await files_from_members(swarm.me, invitation_to(copy))
        assert files.path("config.json").read_bytes() == (copy.folder / "config.json").read_bytes()
        return list(files.listing())

    assert run(scene) == sorted(SIZES)
    assert (tmp_path / "weights").is_dir()


def test_a_thread_that_waits_for_pieces_is_let_go_when_its_machine_leaves(copy: FolderPieces, tmp_path: Path) -> None:
    """The event loop is not needed for it: a server that stops waits for its threads."""

    async def scene() -> str:
        network, is_fetching = MemoryNetwork(), asyncio.Event()

        class Telling(PieceFetcher):
            async def fetch(self, pieces: Sequence[int]) -> None:
                is_fetching.set()
                await super().fetch(pieces)

        fetch = FetchFromThreads(Telling(network.node("me"), MODEL, PieceStore(copy.manifest, tmp_path)))
        errors: list[str] = []

        def wait() -> None:
            try:
                fetch([0])
            except CheckpointError as error:
                errors.append(str(error))

        thread = threading.Thread(target=wait)
        thread.start()
        await is_fetching.wait()
        fetch.stop()
        thread.join()  # on the event loop, which does nothing else meanwhile
        with pytest.raises(CheckpointError, match="is leaving the swarm"):
            fetch([0])
        await network.close()
        return errors[0]

    assert asyncio.run(scene()) == "this machine is leaving the swarm"


def test_readers_that_are_slow_give_way_to_a_machine_that_joins(copy: FolderPieces, tmp_path: Path) -> None:
    async def scene(swarm: Swarm) -> float:
        await swarm.add("giver", copy)
        slow = [swarm.network.node(f"slow {number}", is_client=True) for number in range(2)]
        for node in slow:
            swarm.network.limit(node.transport.peer, down=1000.0)

        async def hold(node: Node, piece: int) -> None:
            async with member(node.transport, "giver", ()) as giver:
                await giver.piece(copy.manifest, piece)

        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            holding = [group.create_task(hold(node, piece)) for node in slow for piece in (1, 2)]
            await asyncio.sleep(GRACE_SECONDS + 1)
            began = loop.time()
            store = PieceStore(copy.manifest, tmp_path / "store")
            await swarm.fetch(store)
            assert same_files(store, copy)
            for task in holding:
                task.cancel()
        return loop.time() - began

    assert run(scene) < SEND_SECONDS / 3
