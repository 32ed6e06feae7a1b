"""A small trained model, so that a first run needs no download. `docs/stories.md` describes how it was made.

Files and their paths live here. It imports nothing of shoal.
"""

from pathlib import Path

STORIES = Path(__file__).parent / "stories"
