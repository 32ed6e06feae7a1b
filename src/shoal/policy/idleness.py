"""Whether a machine is idle, for a server that computes only while nothing else on it does.

The rule is about the processor time that other programs use. A person who reads or types uses hardly any, and is not
disturbed; programs that compute get the machine within seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

BUSY_CORES = 0.5
"""Other programs that use more of the processor than this, in cores, need it: a desktop at rest uses a tenth of one."""
BUSY_SHARE = 0.1
"""On a machine with many cores, they may use this share of all."""
BUSY_SECONDS = 10.0
"""Over how long their use is averaged before a server gives way to them."""
IDLE_SECONDS = 60.0
"""For how long they have to use less than a half of that before the server begins, or begins again."""


@dataclass(frozen=True)
class Idleness:
    """Whether this machine, with `cores` cores, is idle; at first it is not known to be.

    `looks` are the times at which its use was looked at, in seconds, and what other programs had used until then, in
    seconds of one core.
    """

    cores: int
    is_idle: bool = False
    looks: tuple[tuple[float, float], ...] = ()

    @property
    def limit(self) -> float:
        """The cores that others may use on average while the server computes."""
        return max(BUSY_CORES, BUSY_SHARE * self.cores)

    def looked(self, at: float, used: float) -> Self:
        """The time is `at`, and until now others have used `used` seconds of a core. Both only grow."""
        looks = (*self.looks, (at, used))
        kept = [index for index, (then, _) in enumerate(looks) if at - then >= IDLE_SECONDS]
        now = replace(self, looks=looks[kept[-1] :] if kept else looks)  # the last one before that time began stays
        if self.is_idle:
            recent = now.used_lately
            return now if recent is None or recent <= self.limit else replace(now, is_idle=False, looks=looks[-1:])
        past = now.used_over(IDLE_SECONDS)
        return now if past is None or past > self.limit / 2 else replace(now, is_idle=True)

    @property
    def used_lately(self) -> float | None:
        """The cores that others used on average over the last `BUSY_SECONDS`; `None` if that is not known."""
        return self.used_over(BUSY_SECONDS) if self.looks else None

    def used_over(self, seconds: float) -> float | None:
        """The cores that others used on average over the last `seconds`; `None` if it was not looked at for so long."""
        at, used = self.looks[-1]
        before = [(then, so_far) for then, so_far in self.looks if at - then >= seconds]
        if not before:
            return None
        then, so_far = before[-1]
        return (used - so_far) / (at - then)
