"""The rules by name, as the command line has them."""

from __future__ import annotations

from collections.abc import Callable

from shoal.errors import UserError
from shoal.simulator.fluid.rules import Graded, Never, Rule, SharedPlan
from shoal.simulator.others.central import Central
from shoal.simulator.others.greedy_chains import greedy_chains
from shoal.simulator.others.parallax import parallax
from shoal.simulator.others.petals_moves import Petals

RULES: dict[str, Callable[[], Rule]] = {
    "no moves": Never,
    "PETALS": Petals,
    "graded joining": Graded,
    "shared plan": SharedPlan,
    "shared plan, prediction": lambda: SharedPlan(predicts=True),
    "Parallax": lambda: Central("Parallax", parallax),
    "GBP-CR": lambda: Central("GBP-CR", greedy_chains),
}


def rule_of(name: str) -> Rule:
    """A new rule of this name. Raises `UserError` if there is none."""
    if name not in RULES:
        raise UserError(f"no rule {name!r}", hint=f"the rules are {', '.join(RULES)}")
    return RULES[name]()
