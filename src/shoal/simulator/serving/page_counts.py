"""How many pages a simulated server has free, and how many it keeps for clients that may come back.

It counts what `shoal.server.kv.pages.PagePool` keeps track of page by page. A job's tokens are its own, so no two jobs
share pages, and what is kept of a job is the beginning of its sequence.
"""

from __future__ import annotations

from collections import OrderedDict

PAGE_TOKENS = 16
"""As in `shoal.prefix`, whose import would take seconds."""


def pages_for(num_tokens: int) -> int:
    """How many pages `num_tokens` tokens occupy."""
    return -(-num_tokens // PAGE_TOKENS)


class PageCounts:
    """`num_pages` pages here, and `num_remote` pages on other servers, which are taken last and keep nothing."""

    def __init__(self, num_pages: int, *, num_remote: int = 0) -> None:
        self.num_pages = num_pages + num_remote
        self._num_free = num_pages
        self._num_free_remote = num_remote
        self._num_kept = 0
        self._kept: OrderedDict[int, int] = OrderedDict()  # the pages of a job; those released first are first

    @property
    def num_available(self) -> int:
        """How many pages can be taken."""
        return self._num_free + self._num_kept + self._num_free_remote

    def take(self, num_pages: int) -> int:
        """Take pages: free ones, then those that are kept for others, then remote ones. Returns how many are remote."""
        assert 0 <= num_pages <= self.num_available
        here = min(num_pages, self._num_free + self._num_kept)
        self._forget(here - self._num_free)
        self._num_free -= min(here, self._num_free)
        self._num_free_remote -= num_pages - here
        return num_pages - here

    def _forget(self, num_pages: int) -> None:
        """Give kept pages away: of the job whose pages were released first, the last ones."""
        while num_pages > 0:
            job, kept = next(iter(self._kept.items()))
            given = min(kept, num_pages)
            self._num_kept -= given
            num_pages -= given
            if given == kept:
                del self._kept[job]
            else:
                self._kept[job] = kept - given

    def find(self, job: int) -> int:
        """Take all pages that are kept of a job. Returns how many these are."""
        found = self._kept.pop(job, 0)
        self._num_kept -= found
        return found

    def release(self, job: int, *, num_pages: int, num_full: int, num_remote: int) -> None:
        """Release a job's pages. The full ones are kept, unless they are remote."""
        here = num_pages - num_remote
        kept = min(num_full, here)
        self._num_free += here - kept
        self._num_free_remote += num_remote
        if kept:
            assert job not in self._kept
            self._kept[job] = kept
            self._num_kept += kept

    def check(self, held: int) -> None:
        """Raise `AssertionError` unless sessions hold exactly `held` pages."""
        counts = (self._num_free, self._num_kept, self._num_free_remote, held)
        assert min(counts) >= 0, f"a negative count of pages: {counts}"
        assert sum(counts) == self.num_pages, f"pages are lost or held twice: {counts}"
