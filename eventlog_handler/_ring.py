"""The journal's ring: how events stand in a mapped file, and how they are found again.

A store into a shared mapping is in the page cache at once, so it is there after `kill -9` without a
system call on the caller's side. Layout, in 64-bit words, little-endian but for the head, which is
in the machine's own order:

```
0      header: magic, capacity, nonce, checksum      a second copy lies at 512
1024   tail: position, checksum                      a second slot lies at 1536
2048   head: position (a hint)
2560   note: length, checksum, text of the owner's
4096   ring of `capacity` bytes
```

A record is its position xor the nonce, its CRC-32 and length in one word, then the payload, padded
to 16 bytes; one without payload says that the rest of the lap is empty. Positions count from 0 and
never wrap, only their place in the ring does: so what an earlier lap left can be told from what is
new, and a reader that has lost its way finds the next record.
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Iterable
from typing import NamedTuple

MAGIC = int.from_bytes(b"EVLRING4", "little")
HEADER_BYTES = 4096
ALIGN = 16
_COPIES = (0, 512)
_TAILS = (1024, 1536)
_HEAD = 2048
_NOTE = 2560
_LARGE = 16 * 1024
"""Bytes from which a payload is not copied, to be stored and to wait with its frame as one."""
_WORD = struct.Struct("<Q")
_WORDS = struct.Struct("<QQ")
_RECORD = struct.Struct("<QII")
_frame = _RECORD.pack
_FIELDS = struct.Struct("<QQQ")
_HEADER = struct.Struct("<QQQQ")


class Damage(NamedTuple):
    """Bytes of a ring that should have been records and are not."""

    position: int
    content: bytes


_checksum = zlib.crc32
"""Of a record's payload, from its position plus 1.

For one content each start gives another sum, so that the place counts as the content does. Never
from 0: of nothing the sum would be 0 then, as that of a word that is not written yet.
"""


def space(payload: bytes) -> int:
    """Return how many bytes a record takes."""
    return 16 + (len(payload) + ALIGN - 1) // ALIGN * ALIGN


class Ring:
    """Writes records into a buffer; knows nothing of files, threads or signals.

    Args:
        buffer: `HEADER_BYTES` and the ring, a multiple of 16 bytes; all zeros.
        nonce: What positions are xor-ed with: random, so that no content can pass for a record.
        note: Anything that a reader should know, up to 1,000 bytes.
    """

    def __init__(self, buffer: memoryview, nonce: int, note: bytes = b"") -> None:
        self.buffer = buffer
        self._head = buffer[_HEAD : _HEAD + 8].cast("Q")
        self._nonce = nonce
        self.capacity = len(buffer) - HEADER_BYTES
        self.head = self.tail = 0
        self._lap = 0
        """The position at which the lap began that is written."""
        self._free = 0
        """Up to which position of this lap there is room, as far as is known."""
        self._tail_writes = 0
        self._done: dict[int, int] = {}
        fields = (MAGIC, self.capacity, nonce)
        header = _HEADER.pack(*fields, zlib.crc32(_FIELDS.pack(*fields)))
        for at in _COPIES:
            buffer[at : at + len(header)] = header
        text = _WORDS.pack(len(note), zlib.crc32(note)) + note
        buffer[_NOTE : _NOTE + len(text)] = text
        for _ in _TAILS:
            self._advance(0)

    def append(self, payload: bytes) -> tuple[int, int, bytes, int] | None:
        """Write a record; return its place, or None where there is no room.

        It counts once its checksum fits what stands behind it, in whatever order the bytes arrive.
        What a kill or an exception cuts off before that is overwritten by the next.

        Returns:
            Where it begins and ends; what is to be kept of it, which may be smaller than `payload`;
            and from where on that is the payload.
        """
        begin = position = self.head
        length = len(payload)
        size = length + 31 & -ALIGN  # as `space`, without the call
        if begin + size > self._free:
            found = self._make_room(size)
            if found is None:
                return None
            position = found
        at = HEADER_BYTES + position - self._lap
        kept = _frame(position ^ self._nonce, _checksum(payload, position + 1), length)
        if length < _LARGE:
            # As one: a second store costs more than the copy.
            kept, skip = kept + payload, 16
            self.buffer[at : at + 16 + length] = kept
        else:
            self.buffer[at : at + 16] = kept
            kept, skip = payload, 0
            self.buffer[at + 16 : at + 16 + length] = kept
        self._head[0] = self.head = end = position + size
        return begin, end, kept, skip

    def _make_room(self, size: int) -> int | None:
        """Return where a record of `size` bytes can begin, or None where there is no room."""
        capacity, begin = self.capacity, self.head
        left = capacity - begin % capacity
        position = begin if size <= left else begin + left
        if position + size - self.tail > capacity:
            return None
        # Nothing is free, should an exception come before all of this is in step again.
        self._free = 0
        if position != begin:
            at = HEADER_BYTES + begin % capacity
            words = _frame(begin ^ self._nonce, _checksum(b"", begin + 1), 0)
            self.buffer[at : at + 16] = words
            self.head = position
        self._lap = position - position % capacity
        self._free = min(self._lap, self.tail) + capacity
        return position

    def done(self, begin: int, end: int) -> None:
        """Let go of a record; its room is free once all before it are done too."""
        self.all_done([(begin, end)])

    def all_done(self, regions: Iterable[tuple[int, int]]) -> None:
        """Let go of records, given by where they begin and end, and note it once."""
        done, tail = self._done, self.tail
        done.update(regions)
        while tail in done:
            tail = done.pop(tail)
        if tail != self.tail:
            self._advance(tail)

    def clear(self) -> None:
        """Let go of everything, and go on where the next lap begins.

        What is written again and again stays in the processor's cache, and its pages need no fault.
        """
        self._done.clear()
        self._free = 0
        self.head += -self.head % self.capacity
        # Both slots: an older one would tell of records in the stretch that is left out.
        for _ in _TAILS:
            self._advance(self.head)
        self._head[0] = self.head

    def release(self) -> None:
        """Let go of the buffer."""
        self._head.release()
        self.buffer.release()

    def _advance(self, position: int) -> None:
        # In turns, so that one of the two slots is whole whenever the process dies.
        at = _TAILS[self._tail_writes % 2]
        self._tail_writes += 1
        self.buffer[at : at + 16] = _WORDS.pack(position, zlib.crc32(_WORD.pack(position)))
        self.tail = position


def read_ring(content: bytes) -> tuple[list[bytes], list[Damage]]:
    """Return the payloads that stand in a ring, in order, and what is damaged.

    Args:
        content: The whole file.

    Returns:
        Payloads, and stretches in which a record should be and cannot be read; a file whose header
        cannot be read is one such stretch, unless it was never written.
    """
    header = _read_header(content) if len(content) >= HEADER_BYTES else None
    if header is None:
        return [], [Damage(0, content)] if content.strip(b"\0") else []
    capacity, nonce = header
    # What a cut took off reads as never written.
    content = content.ljust(HEADER_BYTES + capacity, b"\0")
    head = int.from_bytes(content[_HEAD : _HEAD + 8], sys.byteorder)
    position, sure = _read_tail(content)
    if not sure and position + capacity < head <= position + 2 * capacity:
        # An older tail, part of whose lap is overwritten.
        position = head - capacity
    end = position + capacity
    payloads: list[bytes] = []
    damage: list[Damage] = []
    lost_at: int | None = None
    # Up to `head` a record that cannot be read is damage, and the next one is looked for. One more
    # may follow: of a process that died before it noted its last record there.
    while position < end:
        record = _read_record(content, capacity, nonce, position, end)
        if record is None:
            if not position < head <= end:
                break
            lost_at = position if lost_at is None else lost_at
            position += ALIGN
            continue
        if lost_at is not None:
            damage.append(_stretch(content, capacity, lost_at, position))
            lost_at = None
        payload, position = record
        if payload:
            payloads.append(payload)
    if lost_at is not None:
        damage.append(_stretch(content, capacity, lost_at, head))
    return payloads, damage


def read_note(content: bytes) -> bytes:
    """Return the note of a ring, empty where there is none or it cannot be read."""
    if len(content) < HEADER_BYTES:
        return b""
    length, check = _WORDS.unpack_from(content, _NOTE)
    note = content[_NOTE + _WORDS.size :][: min(length, HEADER_BYTES)]
    return note if check == zlib.crc32(note) else b""


def _read_header(content: bytes) -> tuple[int, int] | None:
    for at in _COPIES:
        magic, capacity, nonce, check = _HEADER.unpack_from(content, at)
        if magic == MAGIC and check == zlib.crc32(_FIELDS.pack(magic, capacity, nonce)):
            return capacity, nonce
    return None


def _read_tail(content: bytes) -> tuple[int, bool]:
    """Return the newer of the slots that are whole, and whether both are.

    If one is not, the other may be older; that costs a second look at the events' ids.
    """
    positions = [
        position
        for position, check in (_WORDS.unpack_from(content, at) for at in _TAILS)
        if check == zlib.crc32(_WORD.pack(position))
    ]
    return max(positions, default=0), len(positions) == len(_TAILS)


def _read_record(
    content: bytes, capacity: int, nonce: int, position: int, end: int
) -> tuple[bytes, int] | None:
    """Return the payload of the record at `position` and where the next one is, or None."""
    at = HEADER_BYTES + position % capacity
    tag, check, length = _RECORD.unpack_from(content, at)
    if tag != position ^ nonce:
        return None
    payload = content[at + 16 : at + 16 + length]
    if len(payload) != length or check != _checksum(payload, position + 1):
        return None
    left = capacity - position % capacity
    following = position + (space(payload) if payload else left)
    return (payload, following) if following <= end else None


def _stretch(content: bytes, capacity: int, begin: int, end: int) -> Damage:
    ring = content[HEADER_BYTES:]
    begin, end = begin % capacity, (end - 1) % capacity + 1
    return Damage(begin, ring[begin:end] if begin < end else ring[begin:] + ring[:end])
