"""Which conversation uses which page of key-value memory, and what finished ones left. No torch.

A page that is full is filed under everything that stands before its end: pictures by content,
text by token (`Prompt.keys`). A later prompt that begins alike takes the page as it is, whoever
wrote it: the next turn of a conversation, a retry, a shared system text or picture.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

from minigpt4.engine.rows import PAGE

_ROOT = b""


class PageCache:
    """Counts the users of `count` pages; those that nobody uses stay until they are needed.

    Pages are taken out of a reservation made when a request is admitted, so a request that was
    let in never runs out of memory half-way.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._users = [0] * count
        self._blank = list(range(count - 1, -1, -1))
        self._filed: dict[bytes, int] = {}  # digest of all keys up to a page's end -> page
        self._digests: dict[int, bytes] = {}
        self._left: OrderedDict[int, None] = OrderedDict()  # filed and unused, oldest first
        self._reserved = 0

    @property
    def free(self) -> int:
        """Pages that a new request could be promised."""
        return len(self._blank) + len(self._left) - self._reserved

    def match(self, keys: Sequence[int]) -> list[int]:
        """Pages that hold the longest known beginning of `keys`; their user is counted."""
        pages, digest = [], _ROOT
        for start in range(0, len(keys) - PAGE + 1, PAGE):
            digest = _extend(digest, keys[start : start + PAGE])
            page = self._filed.get(digest)
            if page is None:
                break
            pages.append(page)
        for page in pages:
            self.share(page)
        return pages

    def share(self, page: int) -> None:
        """One more user of a page in use or left."""
        if self._users[page] == 0:
            del self._left[page]
        self._users[page] += 1

    def reserve(self, pages: int, spare: int = 0) -> bool:
        """Promise that many pages; false where fewer than `spare` would be left."""
        if pages + spare > self.free:
            return False
        self._reserved += pages
        return True

    def unreserve(self, pages: int) -> None:
        """Give a promise back."""
        self._reserved -= pages

    def take(self) -> int:
        """A page out of the caller's reservation; what it held is forgotten."""
        self._reserved -= 1
        if self._blank:
            page = self._blank.pop()
        else:
            page, _ = self._left.popitem(last=False)
            del self._filed[self._digests.pop(page)]
        self._users[page] = 1
        return page

    def file(self, page: int, before: bytes, keys: Sequence[int]) -> bytes:
        """A page has become full: note what it holds. `before`: the digest of the page before it
        (empty for the first); its own is returned."""
        digest = _extend(before, keys)
        if digest not in self._filed:
            self._filed[digest] = page
            self._digests[page] = digest
        return digest

    def forget(self, pages: Sequence[int]) -> None:
        """What these pages in use hold shall not be reused."""
        for page in pages:
            if page in self._digests:
                del self._filed[self._digests.pop(page)]

    def release(self, pages: Sequence[int]) -> None:
        """One user less of each. Of what is left over, a conversation's end is given up first."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._digests:
                    self._left[page] = None
                else:
                    self._blank.append(page)

    def digests(self, keys: Sequence[int]) -> list[bytes]:
        """What the full pages of `keys` are filed under."""
        found, digest = [], _ROOT
        for start in range(0, len(keys) - PAGE + 1, PAGE):
            found.append(digest := _extend(digest, keys[start : start + PAGE]))
        return found


def _extend(before: bytes, keys: Sequence[int]) -> bytes:
    content = ",".join(map(str, keys)).encode()
    return hashlib.blake2b(before + content, digest_size=20).digest()
