"""What peers have computed for each other: signed statements of it, the files that keep them, and what they earn.

It imports `shoal.policy.contribution`, the identities of `shoal.net`, `shoal.protocol`, `shoal.host` and the ground.
"""

from __future__ import annotations
