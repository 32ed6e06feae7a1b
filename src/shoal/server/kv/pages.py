"""Who has which pages of the KV cache. Counting only: the memory itself is `shoal.server.kv.paged_cache`.

A page is *free*, *held* by one or several sequences, or *kept*: held by nobody, but full, and known by the digest of
the inputs that led to it, so that a sequence which begins with the same inputs may have it back. Kept pages are given
away, the longest unused first, when no page is free.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from shoal.prefix import PAGE_TOKENS


def pages_for(num_tokens: int) -> int:
    """How many pages so many tokens of one sequence take."""
    return -(-num_tokens // PAGE_TOKENS)


class PagePool:
    """`num_pages` pages. Every page that is taken or shared is to be released once."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages))  # a heap: low numbers first, so that a sequence's pages lie in a row
        self._holders: dict[int, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # the longest unused first
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_available(self) -> int:
        """How many pages can be taken."""
        return len(self._free) + len(self._kept)

    def take(self, num_pages: int) -> list[int]:
        """Pages of unknown content. It is for the caller to know that so many are available."""
        assert num_pages <= self.num_available
        pages: list[int] = []
        for _ in range(num_pages):
            if self._free:
                page = heapq.heappop(self._free)
            else:
                page, _ = self._kept.popitem(last=False)
                del self._page_of[self._digest_of.pop(page)]
            self._holders[page] = 1
            pages.append(page)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each of these, which are held or kept."""
        for page in pages:
            self._kept.pop(page, None)
            self._holders[page] = self._holders.get(page, 0) + 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder less for each of these. Those at the end of a sequence are forgotten before those at its start."""
        for page in reversed(list(pages)):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if page in self._digest_of:
                self._kept[page] = None
            else:
                heapq.heappush(self._free, page)

    def is_shared(self, page: int) -> bool:
        """Whether it must not be changed: somebody else holds it too, or may come to."""
        return self._holders[page] > 1 or page in self._digest_of

    def know(self, page: int, digest: bytes) -> None:
        """A page is full, and this is what led to it. The first page of its kind is the one that is shared."""
        if digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def known(self, digests: Sequence[bytes]) -> list[int]:
        """The pages of as many of the first digests as are known, without a gap."""
        return list(self._known(digests))

    def _known(self, digests: Sequence[bytes]) -> Iterator[int]:
        for digest in digests:
            if (page := self._page_of.get(digest)) is None:
                return
            yield page

    def forget(self) -> None:
        """No page is known any more: what nobody holds is free."""
        for page in self._kept:
            heapq.heappush(self._free, page)
        self._kept.clear()
        self._page_of.clear()
        self._digest_of.clear()

    def check_integrity(self, held: Iterable[int]) -> None:
        """Raise `AssertionError` unless exactly these pages are held, each as often as it is named here."""
        assert Counter(held) == Counter(self._holders), "pages are held that nobody has, or the other way round"
        free, kept, taken = set(self._free), set(self._kept), set(self._holders)
        assert len(free) == len(self._free), "a page is free twice"
        assert free.isdisjoint(kept) and kept.isdisjoint(taken), "a page is in two states"  # noqa: PT018
        assert len(free) + len(kept) + len(taken) == self.num_pages, "a page is lost"
        assert kept <= self._digest_of.keys() <= kept | taken, "a page is known that is free, or kept for nothing"
        assert {digest: page for page, digest in self._digest_of.items()} == self._page_of
