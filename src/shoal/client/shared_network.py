"""The network nodes of this process: models that join by the same peers share one node, on one thread."""

from __future__ import annotations

import asyncio
import threading
from weakref import WeakValueDictionary

from shoal.client.runtime import LoopThread, Runtime
from shoal.net import NetworkConfig, join
from shoal.net.transport import Node


class NetworkThread(LoopThread):
    """An event loop on a thread, with one node of the network that `config` describes."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self._config = config
        self._node: Node | None = None
        self._joining = asyncio.Lock()

    async def node(self) -> Node:
        """The node, which the first call joins. Raises as `shoal.net.join` does; then the next call tries again."""
        async with self._joining:
            if self._node is None:
                self._node = await self.resources.enter_async_context(join(self._config))
            return self._node


_threads: WeakValueDictionary[NetworkConfig, NetworkThread] = WeakValueDictionary()
"""Those that runtimes of this process use, by how they joined."""
_lock = threading.Lock()


def join_shared(config: NetworkConfig) -> tuple[Runtime, Node]:
    """A runtime for one more model, and the node that it shares with the models that joined by the same `config`.

    The last of these runtimes to be closed closes the node and ends the thread. Raises as `shoal.net.join` does.
    """
    with _lock:
        thread = _threads.get(config)
        if thread is None or not thread.acquire():
            thread = _threads[config] = NetworkThread(config)
            thread.acquire()
        runtime = Runtime(thread)
    try:
        return runtime, runtime.run(thread.node())
    except BaseException:
        runtime.close()
        raise
