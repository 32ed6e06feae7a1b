"""A small internet on this machine: Linux network namespaces for hosts, homes behind NATs, and the links between them.

It needs root on Linux, and the programs `ip`, `nft` and `nsenter` (Debian: iproute2, nftables, util-linux). Nothing in
it has a route to this machine's own network, so addresses may be any. It imports `shoal.host` and the ground.

    with Internet() as net:
        public = net.host("public")
        laptop = net.home("cottage", Nat.SYMMETRIC).host("laptop")
        first = public.start("up", MODEL)          # a `shoal` process
        laptop.start("join", first.facts["code"])
        laptop.cut()                               # as if its cable were pulled
"""

from __future__ import annotations

from shoal.testing.namespaces.internet import Home, Host, Internet
from shoal.testing.namespaces.nat import Nat
from shoal.testing.namespaces.system import missing_for_namespaces

__all__ = ["Home", "Host", "Internet", "Nat", "missing_for_namespaces"]
