"""A small trained model, so that a first run needs no download, and a smaller one that guesses what it says.

`docs/stories.md` describes how they were made. Files and their paths live here. It imports nothing of shoal.
"""

from pathlib import Path

STORIES = Path(__file__).parent / "stories"
STORIES_DRAFT = Path(__file__).parent / "stories_draft"
"""A draft of two blocks for `STORIES`. Both know the same few stories, so it is right more often than drafts are."""
