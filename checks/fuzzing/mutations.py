"""Random changes of bytes and of nested data (JSON, YAML, state dicts)."""

import copy
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

Key = str | int

ODD_VALUES: tuple[Callable[[random.Random], Any], ...] = (
    lambda draw: None,
    lambda draw: draw.choice((True, False)),
    lambda draw: draw.choice((0, 1, -1, 2, 3, 255, 256, 2**15, 2**31, 2**32, 2**63, 10**30, -(2**31))),
    lambda draw: draw.choice((0.0, -0.0, 0.5, -1.5, 1e-30, 1e30, 1e308, float("nan"), float("inf"), float("-inf"))),
    lambda draw: draw.choice(("", "0", "-1", "nan", "a", "../a", "/", "\0", "a\0b", "\ud800", "x" * 5000)),
    lambda draw: draw.choice(([], [[]], [0], ["a"], [None, 1], [1.5] * 6, [[0, 0, 5, 0, 5, 5]], [float("nan")] * 6)),
    lambda draw: draw.choice(({}, {"id": 1}, {"counts": "", "size": [1, 1]}, {"counts": [5], "size": [-1, 2]})),
    lambda draw: nested(draw.choice((10, 90))),
)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """Make one to four changes: flip bits, replace bytes, remove, repeat or copy ranges, or cut off the end."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place, length = draw.randrange(len(data) + 1), draw.choice((1, 1, 2, 4, 16, 64))
        kind = draw.randrange(7)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[place : place + length] = draw.randbytes(length)
        elif kind == 2:
            del data[place : place + length]
        elif kind == 3:
            data[place:place] = data[place : place + length] * draw.choice((1, 2, 50))
        elif kind == 4:
            other = draw.randrange(len(data) + 1)
            data[place : place + length] = data[other : other + length]
        elif kind == 5:
            data[place : place + length] = draw.choice((b"\0", b"\xff", b"\x7f")) * length
        elif draw.random() < 0.3:
            del data[place:]
    return bytes(data)


def places(value: Any, prefix: tuple[Key, ...] = ()) -> list[tuple[Key, ...]]:
    """Return the paths of all items in nested dicts and lists, without the path of the whole."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, item in items:
        found.append((*prefix, key))
        found += places(item, (*prefix, key))
    return found


def mutate_tree(tree: Any, draw: random.Random, changes: int) -> Any:
    """Return a copy of nested dicts and lists, with values replaced, removed, repeated, copied or slightly changed."""
    tree = copy.deepcopy(tree)
    for _ in range(changes):
        paths = places(tree)
        if not paths:
            break
        parent, key = _parent(tree, draw.choice(paths))
        kind = draw.randrange(8)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif kind == 2:
            other, other_key = _parent(tree, draw.choice(paths))
            if other is not parent or not isinstance(parent, list):
                parent[key] = copy.deepcopy(other[other_key])
        elif kind in (3, 4, 5):
            parent[key] = nudge(parent[key], draw)
        else:
            parent[key] = odd_value(draw)
    return tree


def odd_value(draw: random.Random) -> Any:
    return draw.choice(ODD_VALUES)(draw)


def nudge(value: Any, draw: random.Random) -> Any:
    """Return a slightly changed value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice((value + 1, value - 1, -value, 0, value * 1000, value + draw.randint(-20, 20)))
    if isinstance(value, float):
        return draw.choice((value + draw.uniform(-5, 5), -value, 0.0, value * 1e6, float("nan"), float("inf")))
    if isinstance(value, str):
        place = draw.randrange(len(value) + 1)
        return draw.choice((value[:place], value[place:], value[:place] + chr(draw.randrange(1, 300)) + value[place:]))
    if isinstance(value, list):
        return draw.choice((value[:-1], value + value[:1], value[::-1], []))
    return odd_value(draw)


def _parent(tree: Any, path: tuple[Key, ...]) -> tuple[Any, Key]:
    for key in path[:-1]:
        tree = tree[key]
    return tree, path[-1]


# PNG: changed chunks need right checksums, because readers reject the file otherwise.


def png_chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    """Return (type, data) of each chunk of a PNG."""
    chunks, place = [], 8
    while place + 8 <= len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += length + 12
    return chunks


def join_png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in chunks:
        parts += [struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(kind + data))]
    return b"".join(parts)


def mutate_png(content: bytes, draw: random.Random) -> bytes:
    """Change chunks of a PNG (header, palette, pixels, text, order), with right checksums."""
    chunks = png_chunks(content)
    place = draw.randrange(len(chunks))
    kind, data = chunks[place]
    change = draw.randrange(6)
    if change == 0:
        size = struct.pack(">II", *(draw.choice((0, 1, 15, 17, 12000, 70000, 2**31 - 1, 2**32 - 1)) for _ in range(2)))
        chunks[0] = (b"IHDR", size + chunks[0][1][8:])
    elif change == 1:
        chunks[0] = (b"IHDR", chunks[0][1][:8] + bytes(draw.choice((0, 1, 2, 3, 4, 6, 8, 16)) for _ in range(5)))
    elif change == 2:
        chunks.insert(draw.randrange(len(chunks) + 1), chunks.pop(place))
    elif change == 3:
        chunks[place : place + 1] = [] if draw.random() < 0.5 else [(kind, data)] * 2
    elif change == 4:
        text = zlib.compress(b"\0" * 50_000_000) if draw.random() < 0.01 else b"x"
        added = ((b"zTXt", b"a\0\0" + text), (b"tRNS", b"\0\0"), (b"eXIf", draw.randbytes(40)), (b"acTL", b"\0" * 8))
        chunks.insert(1, draw.choice(added))
    else:
        chunks[place] = (kind, mutate_bytes(data, draw))
    return join_png(chunks)
