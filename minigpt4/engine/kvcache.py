"""The blocks of the key-value cache, used by running conversations and kept from finished ones. No
torch.

A full block is registered under the hash of everything up to its end: pictures by content, text by
token (`Prompt.keys`). Later prompts with the same beginning share the block, even in another
conversation: the next turn, a retry, a common system text or picture.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

BLOCK_SIZE = 16  # positions whose keys and values are stored together


class BlockCache:
    """Counts the references to `count` blocks, and keeps registered ones until it needs them.

    Blocks are allocated from a reservation made when a request is admitted, so an admitted request
    never runs out of memory half-way. Used by one thread.

    kept: after so many blocks have been used, registered ones are evicted before further ones are
    used for the first time, which costs memory; None: `count`.
    """

    def __init__(self, count: int, kept: int | None = None) -> None:
        self.count, self.kept = count, count if kept is None else kept
        self._ref_counts = [0] * count
        self._used = 0  # blocks with this number or a higher one have never been used
        self._free: list[int] = []
        self._by_hash: dict[bytes, int] = {}  # hash of all keys up to a block's end -> block
        self._hashes: dict[int, bytes] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()  # registered, unused; oldest first
        self._reserved = 0

    @property
    def available(self) -> int:
        """Blocks that a new request could reserve."""
        unused = self.count - self._used
        return unused + len(self._free) + len(self._evictable) - self._reserved

    def match(self, keys: Sequence[int]) -> list[int]:
        """The blocks that hold the longest known prefix of `keys`, each with one more reference."""
        blocks = []
        for block_hash in hashes(keys):
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        for block in blocks:
            self.share(block)
        return blocks

    def share(self, block: int) -> None:
        """Add a reference to a block that is in use or registered."""
        if self._ref_counts[block] == 0:
            del self._evictable[block]
        self._ref_counts[block] += 1

    def reserve(self, blocks: int, spare: int = 0) -> bool:
        """Reserve that many blocks; False if fewer than `spare` would remain available."""
        if blocks + spare > self.available:
            return False
        self._reserved += blocks
        return True

    def unreserve(self, blocks: int) -> None:
        """Cancel what is left of a reservation."""
        self._reserved -= blocks

    def allocate(self) -> int:
        """A block from the caller's reservation; evicts the oldest unused one if none is free."""
        self._reserved -= 1
        if self._free:
            block = self._free.pop()
        elif self._used < (self.kept if self._evictable else self.count):
            block = self._used
            self._used += 1
        else:
            block, _ = self._evictable.popitem(last=False)
            del self._by_hash[self._hashes.pop(block)]
        self._ref_counts[block] = 1
        return block

    def register(self, block: int, before: bytes, keys: Sequence[int]) -> bytes:
        """Make a full block available to other prompts; returns its hash.

        before: the hash of the block before it, b"" for the first. keys: the block's own.
        """
        block_hash = _extend(before, keys)
        if block_hash not in self._by_hash:
            self._by_hash[block_hash] = block
            self._hashes[block] = block_hash
        return block_hash

    def unregister(self, blocks: Sequence[int]) -> None:
        """Stop other prompts from sharing these blocks, which are in use."""
        for block in blocks:
            if block in self._hashes:
                del self._by_hash[self._hashes.pop(block)]

    def free(self, blocks: Sequence[int]) -> None:
        """Remove one reference from each. A conversation's last blocks are evicted first."""
        for block in reversed(blocks):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if block in self._hashes:
                    self._evictable[block] = None
                else:
                    self._free.append(block)


def hashes(keys: Sequence[int]) -> list[bytes]:
    """The hash of each full block of `keys`."""
    found, block_hash = [], b""
    for start in range(0, len(keys) - BLOCK_SIZE + 1, BLOCK_SIZE):
        block_hash = _extend(block_hash, keys[start : start + BLOCK_SIZE])
        found.append(block_hash)
    return found


def _extend(before: bytes, keys: Sequence[int]) -> bytes:
    content = ",".join(map(str, keys)).encode()
    return hashlib.blake2b(before + content, digest_size=20).digest()
