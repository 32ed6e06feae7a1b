"""What a server says of itself beside its span and its load: its capacity, its network, its place and its age."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace

from shoal.model.body import Body
from shoal.model.families import text_config
from shoal.net.transport import Node
from shoal.peers import Capacity, ServerInfo
from shoal.policy.machines.speed_profile import MAX_SPEED, SpeedProfile
from shoal.server.config import ServerConfig
from shoal.server.executor import Executor
from shoal.server.measured_speed import speeds_in
from shoal.server.measuring.means import Means
from shoal.server.measuring.metering import Meter, metered
from shoal.server.measuring.network_monitor import NetworkMonitor, in_order
from shoal.server.measuring.own_capacity import own_capacity, remembered_capacity
from shoal.server.measuring.zones import zone_of
from shoal.server.neighbors import NeighborMonitor
from shoal.server.speed_watch import Speeds


class Portrait:
    """Completes the descriptions of one server. `node` is its access to the network, which the portrait meters.

    `capacity` is what it is assumed to have, or has measured; `None` before. `profile` is how fast its blocks were when
    they were measured, and `speeds` the last that are known of any span. The server has been up since the portrait was
    made. `clock` is the Unix time.
    """

    def __init__(self, config: ServerConfig, node: Node, *, clock: Callable[[], float] = time.time) -> None:
        self.capacity: Capacity | None = None
        self.profile: SpeedProfile | None = None
        self.speeds: Speeds | None = None
        self._config = config
        self._meter = Meter()
        self._up_since = clock()
        self._measured: Speeds | None = None  # those of the span when the capacity was measured
        self._network: NetworkMonitor | None = None
        self.node = metered(node, self._meter)

    async def remember_capacity(self, means: Means, executor: Executor) -> None:
        """Use the capacity that was measured at an earlier start, if there is one."""
        self.capacity = await executor.run(lambda: remembered_capacity(self._config, means))

    async def add_capacity(self, means: Means, body: Body, profile: SpeedProfile, executor: Executor) -> None:
        """The server has loaded blocks, which are as fast as the `profile` says."""
        self.capacity = await executor.run(lambda: own_capacity(self._config, means, body, profile))
        self.profile, self._measured = profile, speeds_in(profile, body.span)

    def complete(self, info: ServerInfo) -> ServerInfo:
        """The description of a server, with its present speeds, its place and its age.

        A server that turned out to decode at another speed than it measured would do so with other spans too.
        """
        capacity = self.capacity
        if capacity is not None:
            factor = 1.0
            if self._measured is not None and info.decode_speed is not None:
                factor = info.decode_speed / self._measured.decode
            speeds = tuple((length, min(MAX_SPEED, speed * factor)) for length, speed in capacity.block_speeds)
            capacity = replace(capacity, block_speeds=speeds, network_speed=self._network_speed)
        return replace(info, capacity=capacity, zone=self._zone, up_since=self._up_since)

    def measuring(
        self, means: Means, neighbors: NeighborMonitor, *, is_ready: Callable[[], bool], on_change: Callable[[], None]
    ) -> contextlib.AbstractAsyncContextManager[None]:
        """Measure the network, unless the config says that it must not be used for that, until the context is left.

        It waits until the server `is_ready`: while blocks are loaded, nothing else is quick.
        """
        if not self._config.measures_network:
            return contextlib.nullcontext()
        hidden_size: int = text_config(means.checkpoint.config).hidden_size
        token_bytes = hidden_size * means.dtype.itemsize
        self._network = NetworkMonitor(
            self.node.transport,
            self._meter,
            token_bytes=token_bytes,
            partners=lambda: in_order(neighbors.servers, zone=self._zone) if is_ready() else (),
            on_change=on_change,
            estimate=None if self._network is None else self._network.estimate,
        )
        return self._network.measuring()

    @property
    def _zone(self) -> str:
        return zone_of(self.node.transport.addresses) if self._config.zone is None else self._config.zone

    @property
    def _network_speed(self) -> float | None:
        speed = None if self._network is None else self._network.speed
        return None if speed is None else min(MAX_SPEED, speed)
