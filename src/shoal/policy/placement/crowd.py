"""The shared plan in a crowd: a swarm too large to be read one by one, known as averages of all servers of a span.

A plan of averages says how many servers of a span should go elsewhere, not which. So each of them draws a lot, by its
peer id and the time: on average, as many win as there are moves of their span, and each of these makes its own move.
Others win next time. A server that does not win needs no plan. Two servers never see each other draw, so one more or
one less than planned may go; in a crowd that hardly matters, and the next histogram shows it. Averages are estimates,
so blocks count as weaker only if they are weaker by more than `MARGIN`.

Plans are not made of the servers that a peer happens to have read: with a few hundred of ten thousand, some blocks
look weak by chance, other ones to each server, and all would move for ever.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from shoal.policy.machines.lifetime import Lifetimes
from shoal.policy.machines.machine import Machine
from shoal.policy.machines.throughput import block_throughputs
from shoal.policy.placement.plan import MAX_MOVES, Move, plan_moves

DRAW_SECONDS = 120.0
"""How long a lot counts. By the next draw, the histogram has the servers that went."""
HOLE_DRAW_SECONDS = 30.0
"""The same while blocks have no server: clients are waiting for them."""


MARGIN = 0.1
"""A server goes only to blocks that carry this part less than those that it leaves, or nothing."""


def crowd_plan(
    peer: str, machines: Sequence[Machine], num_blocks: int, now: float, lifetimes: Lifetimes | None = None
) -> tuple[Move, ...]:
    """The moves of the crowd that fall to the server `peer`: one, in its own name, or none.

    `machines` are the averages, each with its `count`, and the server itself, which is counted among them too. It
    depends on `up_since` of the averages whether gains last (`Fleet.quiet`).
    """
    own = next((machine for machine in machines if machine.peer == peer), None)
    averages = [machine for machine in machines if machine.peer != peer]
    if own is None or not own.movable or own.ready_at:
        return ()
    alike = next((each for each in averages if each.movable and each.span == own.span), None)
    if alike is None:
        return ()
    held = {block for each in averages for block in each.span or ()}
    seconds = HOLE_DRAW_SECONDS if len(held) < num_blocks else DRAW_SECONDS
    lot = int(_chance(peer, int(now // seconds)) * alike.count)
    if lot >= MAX_MOVES:
        return ()
    carried = block_throughputs(averages, num_blocks)
    plan = plan_moves(averages, num_blocks, now=now, lifetimes=lifetimes)
    moves = [move for move in plan if move.peer == alike.peer and _is_clear(move, carried)]
    if lot >= len(moves) or len(moves[lot].after) > own.max_blocks:
        return ()
    return (replace(moves[lot], peer=peer, rank=0),)


def _is_clear(move: Move, carried: Sequence[float]) -> bool:
    """Whether the blocks that a move adds are weaker than the others by more than an error of the estimate."""
    gained = [carried[block] for block in move.after if block not in move.before]
    left = [carried[block] for block in move.before if block not in move.after] or [
        carried[block] for block in move.before
    ]
    return bool(gained) and min(gained) <= (1 - MARGIN) * min(left)


def _chance(peer: str, draw: int) -> float:
    """A number from 0 to 1 that is the same whenever the server looks during one draw."""
    return int.from_bytes(hashlib.sha256(f"{draw} {peer}".encode()).digest()[:6]) / (1 << 48)
