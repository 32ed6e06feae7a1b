"""What peers have computed for others, and which priority that earns them."""

from __future__ import annotations
