"""Which sequences hold which pages of the KV cache. It only counts: `shoal.server.kv.paged_cache` is the memory.

A page is in one of three states:

    free --allocate--> held --release--> free          if it has no digest
                       held --release--> evictable     if it has one
                       held <--share---- evictable

A page gets a digest when it is full: the hash of all inputs up to its end. A sequence that begins with the same inputs
shares the page. When no page is free, `allocate` takes evictable pages, the least recently used first.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from shoal.prefix import PAGE_TOKENS


def pages_for(num_tokens: int) -> int:
    """How many pages `num_tokens` tokens of one sequence occupy."""
    return -(-num_tokens // PAGE_TOKENS)


class PagePool:
    """`num_pages` pages. Every page that is allocated or shared has to be released once."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages))  # a heap: low numbers first, so that a sequence's pages are consecutive
        self._num_holders: dict[int, int] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()  # the least recently used first
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_available(self) -> int:
        """How many pages can be allocated."""
        return len(self._free) + len(self._evictable)

    def allocate(self, num_pages: int) -> list[int]:
        """Pages of unknown content, each with one holder. The caller makes sure that they are available."""
        assert num_pages <= self.num_available
        pages: list[int] = []
        for _ in range(num_pages):
            if self._free:
                page = heapq.heappop(self._free)
            else:
                page, _ = self._evictable.popitem(last=False)
                del self._page_of[self._digest_of.pop(page)]
            self._num_holders[page] = 1
            pages.append(page)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add a holder to each of these pages, which are held or evictable."""
        for page in pages:
            self._evictable.pop(page, None)
            self._num_holders[page] = self._num_holders.get(page, 0) + 1

    def release(self, pages: Iterable[int]) -> None:
        """Remove a holder from each of these pages of a sequence. Its last pages will be evicted before its first."""
        for page in reversed(list(pages)):
            self._num_holders[page] -= 1
            if self._num_holders[page]:
                continue
            del self._num_holders[page]
            if page in self._digest_of:
                self._evictable[page] = None
            else:
                heapq.heappush(self._free, page)

    def is_shared(self, page: int) -> bool:
        """Whether a held page must not be written: another sequence holds it too, or can find it by its digest."""
        return self._num_holders[page] > 1 or page in self._digest_of

    def register(self, page: int, digest: bytes) -> None:
        """Give a full page its digest. Of several pages with one digest, the first is found and the others are not."""
        if digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def unregister(self, pages: Iterable[int]) -> None:
        """Remove the digests of pages that are held."""
        for page in pages:
            if (digest := self._digest_of.pop(page, None)) is not None:
                del self._page_of[digest]

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The pages of the first digests, up to the first digest that no page has."""
        return list(self._find(digests))

    def _find(self, digests: Sequence[bytes]) -> Iterator[int]:
        for digest in digests:
            if (page := self._page_of.get(digest)) is None:
                return
            yield page

    def reset_prefixes(self) -> None:
        """Remove all digests. Evictable pages become free."""
        for page in self._evictable:
            heapq.heappush(self._free, page)
        self._evictable.clear()
        self._page_of.clear()
        self._digest_of.clear()

    def check_integrity(self, held: Iterable[int]) -> None:
        """Raise `AssertionError` unless these pages are held, each as often as it occurs in `held`."""
        assert Counter(held) == Counter(self._num_holders), "the pages that are held are not those of the sessions"
        free, evictable, held = set(self._free), set(self._evictable), set(self._num_holders)
        assert len(free) == len(self._free), "a page is free twice"
        assert free.isdisjoint(evictable) and evictable.isdisjoint(held), "a page is in two states"  # noqa: PT018
        assert len(free) + len(evictable) + len(held) == self.num_pages, "a page is lost"
        assert evictable <= self._digest_of.keys(), "a page without a digest is evictable"
        assert self._digest_of.keys() <= evictable | held, "a free page has a digest"
        assert {digest: page for page, digest in self._digest_of.items()} == self._page_of
