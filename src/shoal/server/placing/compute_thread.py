"""The compute thread of a server, with the turns that it takes with other servers of the machine."""

from __future__ import annotations

from typing import Self

import torch

from shoal.ledgers.priorities import Priorities
from shoal.server.config import ServerConfig
from shoal.server.engine.cpu_turns import CpuTurns, folder_of_turns, uses_all_cores
from shoal.server.executor import Executor


class Compute:
    """The compute thread, the turns that it takes with other servers of this machine, and for whom it computes first.

    Leaving the context ends the thread. It waits for the current work only if the server `is_serving`: what is loaded
    or measured then is of no use to anyone.
    """

    def __init__(self, config: ServerConfig, priorities: Priorities) -> None:
        self.executor = Executor(config.num_threads)
        self.priorities = priorities
        self.cpu_turns: CpuTurns | None = None
        self.is_serving = False
        self._num_threads = config.num_threads

    def share_cores(self, device: torch.device) -> None:
        """Take turns with other servers from now on, if a pass uses all cores of the machine. May be called twice."""
        if self.cpu_turns is None and uses_all_cores(device, self._num_threads or torch.get_num_threads()):
            self.cpu_turns = CpuTurns(self.executor, folder_of_turns())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.is_serving:
            self.executor.abandon(None if self.cpu_turns is None else self.cpu_turns.close)
            return
        self.executor.close()
        if self.cpu_turns is not None:
            self.cpu_turns.close()
