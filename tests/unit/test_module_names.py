"""The names of modules and packages occur once, but for those that docs/architecture.md lists."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_names_that_occur_twice_are_those_that_the_documentation_lists() -> None:
    package = REPOSITORY / "src" / "shoal"
    modules = [path.stem for path in package.rglob("*.py") if not path.stem.startswith("__")]
    packages = [path.parent.name for path in package.rglob("__init__.py") if path.parent != package]
    twice = {name: count for name, count in Counter(modules + packages).items() if count > 1}
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    listed = re.search(r"occurs once, with these exceptions: ([^.]*)\.", text)
    assert listed is not None
    assert twice == dict.fromkeys(re.findall(r"`(\w+)`", listed[1]), 2)
