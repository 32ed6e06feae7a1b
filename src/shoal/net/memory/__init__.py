"""A network inside one process, for tests. It loses, delays, alters and breaks exactly what a test says.

    network = MemoryNetwork()
    client, server = network.node("client"), network.node("server")
    await server.transport.listen(handler)
    stream = await client.transport.open("server")
    network.kill("server")                       # receive() and send() raise StreamBroken at once

Time is the event loop's, so delays and expiry cost nothing on a loop with a virtual clock. A peer's id is its name.
It imports `shoal.net` (not `shoal.net.libp2p`), `shoal.policy.census` and `network`, and below.
"""

from __future__ import annotations

from shoal.net.memory.memory_network import MemoryNetwork
from shoal.net.memory.memory_stream import QUEUE_FRAMES, Frame

__all__ = ["QUEUE_FRAMES", "Frame", "MemoryNetwork"]
