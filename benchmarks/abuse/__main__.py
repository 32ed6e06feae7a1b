"""Attack servers, and print what an honest client noticed.

    python -m benchmarks.abuse [--seconds 20] [--list] [NAME ...]

Each attack has servers of its own: `shoal serve` on loopback, with the bundled model, and caches that were filled once.
An honest client is measured alone and, as another one that joins then, under attack, and a third one beside a process
that computes as much as the attacker did. The goals: it keeps at least 0.8 of the speed that is due to it (a part of
that of the third one), it has its first token at most 5 s later and never waits longer for another one, and no server
has more memory than the limits of the attack allow, and 64 MiB. The exit status is 1 if a goal is missed. On a busy
machine, all figures are those of the other work: measure on a quiet one.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.abuse.attacker import attacks_of
from benchmarks.abuse.experiment import print_table, run
from benchmarks.common.machine import describe_machine
from shoal.host.processes import interruptible

MODULES = ("limits_attacks", "directory_attacks", "route_attacks", "compute_attacks")
"""The modules with attacks."""


@interruptible()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="the attacks; all by default")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long the client is measured, three times")
    parser.add_argument("--list", action="store_true", help="print the names")
    arguments = parser.parse_args()
    attacks = {attack.name: (module, attack) for module in MODULES for attack in attacks_of(module)}
    if unknown := set(arguments.names) - attacks.keys():
        parser.error(f"there is no attack {', '.join(sorted(unknown))}; there are: {', '.join(attacks)}")
    if arguments.list:
        print("\n".join(attacks))
        return
    print(describe_machine(), file=sys.stderr)
    outcomes = []
    for name in arguments.names or attacks:
        module, attack = attacks[name]
        print(f"{name} ...", file=sys.stderr)
        outcomes.append(run(module, attack, seconds=arguments.seconds))
    print_table(outcomes, sys.stdout)
    sys.exit(any(outcome.faults() for outcome in outcomes))


if __name__ == "__main__":
    main()
