"""Payloads as bytes: framing, checks, one error for all that is malformed.

A message is a header (magic and version, a fingerprint of the model's shapes
and of the rules), one record a leaf (its rule's tag, then its fields), and a
checksum. The records together may be entropy coded; the header says so.
`docs/wire.md` is the specification. Reading is a trust boundary: the template
decides every length before a byte is looked at, so that a message can neither
make the reader allocate more than the template's size nor yield a payload that
no client can have sent.
"""

from collections.abc import Callable, Sequence
import struct
from typing import NamedTuple

import numpy as np
import xxhash

MAGIC = b"MPQ"
VERSION = 4  # low four bits of its byte; the upper ones name the coding
HEADER = struct.Struct("<3sBI")
CHECKSUM = struct.Struct("<I")
LENGTH = struct.Struct("<I")  # of the first of two messages
OVERHEAD = HEADER.size + CHECKSUM.size  # bytes a message


class WireError(Exception):
  """A message that no encoder of this model and policy can have written."""


Chunk = bytes | memoryview


class Coding(NamedTuple):
  """A lossless coding of all records of a message together.

  Attributes:
    name: as a flag would have it.
    number: in the header, 1 to 15; 0 stands for no coding.
    shrink: records -> coded records.
    expand: (coded records, the longest that records can be) -> records; raises
      WireError, and allocates no more than that.
  """

  name: str
  number: int
  shrink: Callable[[bytes], bytes]
  expand: Callable[[memoryview, int], bytes]


class Field(NamedTuple):
  """A run of numbers in a record whose length the template fixes.

  Attributes:
    name: key of the array in the leaf's payload.
    dtype: NumPy dtype on the device; the wire has it little-endian.
    shape: shape of the array.
    check: array -> whether an encoder can have written it.
  """

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  check: Callable[[np.ndarray], bool]

  @property
  def num_bytes(self) -> int:
    """Bytes on the wire."""
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Reader:
  """A cursor over a message whose checksum has been verified."""

  def __init__(self, message: memoryview):
    self._message = message
    self._at = 0

  def take(self, count: int) -> memoryview:
    """The next `count` bytes."""
    if count > len(self._message) - self._at:
      raise WireError(
        f"record needs {count} bytes at offset {self._at}, message has"
        f" {len(self._message) - self._at} left"
      )
    taken = self._message[self._at : self._at + count]
    self._at += count
    return taken

  def array(self, field: Field) -> np.ndarray:
    """The next field, checked."""
    raw = self.take(field.num_bytes)
    array = np.frombuffer(raw, field.dtype.newbyteorder("<"))
    array = array.astype(field.dtype, copy=False).reshape(field.shape)
    if not field.check(array):
      raise WireError(f"field {field.name!r} holds values no encoder writes")
    return array

  def finish(self) -> None:
    """Raises if anything is left."""
    if self._at != len(self._message):
      raise WireError(
        f"{len(self._message) - self._at} bytes left after the last record"
      )


def write_fields(fields: Sequence[Field], payload: dict) -> list[Chunk]:
  """The fields' arrays as little-endian bytes, in order."""
  chunks: list[Chunk] = []
  for field in fields:
    array = np.asarray(payload[field.name])
    if array.shape != field.shape or array.dtype != field.dtype:
      raise ValueError(
        f"field {field.name!r}: expected {field.dtype}{list(field.shape)}, got"
        f" {array.dtype}{list(array.shape)} (payload of a batch of clients?)"
      )
    chunks.append(array.astype(field.dtype.newbyteorder("<"), copy=False).data)
  return chunks


def read_fields(fields: Sequence[Field], reader: Reader) -> dict:
  """The inverse of `write_fields`; raises WireError."""
  return {field.name: reader.array(field) for field in fields}


def read_tag(reader: Reader, tags: Sequence[int]) -> int:
  """A record's first byte: the index of its tag among those that may stand."""
  tag = reader.take(1)[0]
  if tag not in tags:
    names = ", ".join(f"{known:#04x}" for known in tags)
    raise WireError(f"record has rule {tag:#04x}, expected {names}")
  return tags.index(tag)


def fingerprint(text: str) -> int:
  """32 bits that stand for the shapes and rules both sides agreed on."""
  return xxhash.xxh32_intdigest(text.encode())


def seal(
  print_: int, records: Sequence[Chunk], coding: Coding | None = None
) -> bytes:
  """Frames records into a message, coded where that makes them shorter."""
  body, form = b"".join(records), VERSION
  if coding is not None:
    coded = coding.shrink(body)
    if len(coded) < len(body):
      body, form = coded, VERSION | coding.number << 4
  return reseal(HEADER.pack(MAGIC, form, print_) + body)


def reseal(body: bytes) -> bytes:
  """Appends the checksum of all that stands before it."""
  return body + CHECKSUM.pack(xxhash.xxh32_intdigest(body))


def join(first: bytes, second: bytes) -> bytes:
  """Two messages that travel as one: the length of the first, then both."""
  return LENGTH.pack(len(first)) + first + second


def part(message: bytes) -> tuple[bytes, bytes]:
  """The inverse of `join`; raises WireError."""
  if len(message) < LENGTH.size:
    raise WireError(f"{len(message)} bytes, too short for a pair of messages")
  (length,) = LENGTH.unpack_from(message)
  body = message[LENGTH.size :]
  if length > len(body):
    raise WireError(f"first of a pair has {length} bytes, {len(body)} are left")
  return body[:length], body[length:]


def is_coded(message: bytes) -> bool:
  """Whether the records of a message are entropy coded."""
  return message[len(MAGIC)] >> 4 != 0


def unseal(
  message: bytes, print_: int, max_bytes: int, coding: Coding | None = None
) -> Reader:
  """Checks a message's frame and gives a reader of its records.

  Args:
    message: what came off the wire.
    print_: fingerprint of the receiver's template.
    max_bytes: the longest message that the template allows.
    coding: that both sides agreed on; a message may still come without.

  Returns:
    A reader at the first record.

  Raises:
    WireError: the frame is not one that `seal` writes for this template.
  """
  if len(message) < OVERHEAD:
    raise WireError(f"message of {len(message)} bytes, shorter than its frame")
  view = memoryview(message)
  magic, form, found = HEADER.unpack_from(view)
  if magic != MAGIC:
    raise WireError(f"magic is {magic!r}, expected {MAGIC!r}")
  version, number = form & 0xF, form >> 4
  if version != VERSION:
    raise WireError(f"version {version}, this reader knows {VERSION}")
  if number and (coding is None or number != coding.number):
    agreed = "none" if coding is None else coding.name
    raise WireError(f"entropy coding {number}, agreed was {agreed}")
  if found != print_:
    raise WireError(
      f"fingerprint {found:08x} of model and policy, expected {print_:08x}"
    )
  if len(message) > max_bytes:
    raise WireError(f"message of {len(message)} bytes, at most {max_bytes}")
  body = view[: -CHECKSUM.size]
  (checksum,) = CHECKSUM.unpack_from(view, len(body))
  if xxhash.xxh32_intdigest(body) != checksum:
    raise WireError("checksum does not match: corrupted on the way")
  records = body[HEADER.size :]
  if number and coding is not None:
    expanded = coding.expand(records, max_bytes - OVERHEAD)
    if len(expanded) <= len(records):
      raise WireError("entropy coding makes the records no shorter")
    records = memoryview(expanded)
  return Reader(records)
