"""A swarm in one process: real servers and clients on a network in memory."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from shoal import AutoDistributedModelForCausalLM
from shoal.client.options.client_options import ClientOptions, ModelOptions
from shoal.client.runtime import Runtime
from shoal.model.weights.checkpoint import Checkpoint
from shoal.net.memory import Frame, MemoryNetwork
from shoal.server.config import ServerConfig
from shoal.server.server import Server, serve
from shoal.spans import Span

T = TypeVar("T")

QUICK = ClientOptions(audits="off", silence_seconds=1.5, patience_seconds=1.0, refresh_seconds=0.0, measure_seconds=0.0)
FLOAT32 = replace(QUICK, model=ModelOptions(dtype="float32"))


@dataclass
class Swarm:
    """Servers named "s0", "s1", ... in the order of their spans, and a way to make clients."""

    folder: Path
    runtime: Runtime
    network: MemoryNetwork
    stack: contextlib.ExitStack
    servers: dict[str, Server] = field(default_factory=dict)
    _stops: dict[str, contextlib.AsyncExitStack] = field(default_factory=dict)

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Call something of the network's on the event loop that it belongs to."""

        async def call() -> T:
            return function(*args)

        return self.runtime.run(call())

    def start(self, span: str, *, peer: str | None = None, **options: Any) -> Server:
        """One more server, named "sN" if it is not to be a certain peer."""
        return self._start(peer or f"s{len(self.servers)}", span, **options)

    def restart(self, name: str, span: str, **options: Any) -> Server:
        """A server is killed, and starts again as the same peer with another span."""
        self.kill(name)
        self.stop(name)
        return self._start(name, span, **options)

    def _start(self, name: str, span: str, /, **options: Any) -> Server:
        config = ServerConfig(
            model=str(options.pop("folder", self.folder)),
            blocks=Span.parse(span),
            dtype="float32",
            cache_tokens=4096,
            measures_network=False,
        )
        config = replace(config, **options)
        stop = contextlib.AsyncExitStack()

        async def start() -> Server:
            return await stop.enter_async_context(serve(config, self.network.node(name)))

        server = self.runtime.run(start())
        self.servers[name] = server
        self._stops[name] = stop
        self.stack.callback(self.stop, name)
        return server

    def stop(self, name: str) -> None:
        """Let a server leave politely. May be called twice."""
        self.runtime.run(self._stops[name].aclose())

    def stopping(self, name: str) -> concurrent.futures.Future[None]:
        """The same, without waiting for it."""
        return asyncio.run_coroutine_threadsafe(self._stops[name].aclose(), self.runtime.loop)

    def kill(self, name: str) -> None:
        """End a server as SIGKILL would."""
        self.call(self.network.kill, name)

    def model(
        self, kind: type[Any] = AutoDistributedModelForCausalLM, *, config: ClientOptions = QUICK, **options: Any
    ) -> Any:
        """A client's model, in float32. `options` are those of `ModelOptions`, or changes of the model's config.

        The client may be a certain `peer`.
        """
        name = options.pop("peer", None) or f"client{self.call(lambda: len(self.network.peers))}"
        checkpoint = Checkpoint.open(options.pop("folder", self.folder))
        adapter = options.pop("active_adapter", None)
        node = self.call(self.network.node, name)
        self.runtime.loop_thread.acquire()
        client = Runtime(self.runtime.loop_thread)
        client.resources.push_async_callback(node.transport.close)
        own = {each.name: options.pop(each.name) for each in fields(ModelOptions) if each.name in options}
        config = replace(config, model=ModelOptions(**{"dtype": "float32", **own}, config_changes=options))
        model = kind.from_checkpoint(checkpoint, node, client, options=config, adapter=adapter)
        self.stack.callback(model.close)
        return model

    def say_slow(self, name: str) -> None:
        """From now on a server says of each step that it took a second, which none does here, however busy it is."""

        def slow(frame: Frame) -> Frame:
            header = json.loads(frame.header)
            if frame.sender != name or header["kind"] != "step_result":
                return frame
            return replace(frame, header=json.dumps(header | {"seconds": 1.0}).encode())

        self.network.on_frame = slow

    def settle(self, condition: Callable[[], bool]) -> None:
        """Let the event loop run until a condition holds."""

        async def wait() -> None:
            async with asyncio.timeout(20):
                while not condition():  # noqa: ASYNC110 - nothing tells when it comes to hold
                    await asyncio.sleep(0)

        self.runtime.run(wait())


@contextlib.contextmanager
def swarm_of(folder: Path, *spans: str, **options: Any) -> Iterator[Swarm]:
    """A swarm of servers with these spans; everything is gone when the context is left."""
    runtime = Runtime()
    with contextlib.ExitStack() as stack:
        stack.callback(runtime.close)
        swarm = Swarm(folder, runtime, MemoryNetwork(), stack)
        for span in spans:
            swarm.start(span, **options)
        yield swarm
