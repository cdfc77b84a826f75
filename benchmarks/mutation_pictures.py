"""Changes that know PNG chunks, JPEG segments, JPEG 2000 markers and TIFF entries."""

from __future__ import annotations

import struct
import zlib

from mutation_blind import Rng, blind, extreme, pick
from mutation_seeds import chunk

# --- PNG: chunks, their CRC made right again ---


def png(data: bytes, rng: Rng) -> bytes:
    chunks, at = [], 8
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    if not chunks:
        return blind(data, rng)
    which = int(rng.integers(len(chunks)))
    kind, body = chunks[which]
    way = pick(rng, ("header", "header", "body", "pixels", "pixels", "bomb", "add", "drop", "twice", "swap", "length"))
    if way == "header":
        offset, size = pick(rng, ((0, 4), (4, 4), (8, 1), (9, 1), (10, 1), (11, 1), (12, 1)))
        values = {8: (1, 2, 4, 8, 16, 3, 32), 9: (0, 2, 3, 4, 6, 1, 5, 7), 12: (0, 1, 2)}.get(offset)
        number = pick(rng, values) if values else extreme(rng, size)
        head = chunks[0][1]
        chunks[0] = (chunks[0][0], head[:offset] + number.to_bytes(size, "big") + head[offset + size :])
    elif way == "body":
        chunks[which] = (kind, blind(body, rng))
    elif way == "pixels":  # filter types and samples, behind a sound deflate stream
        packed = b"".join(one for name, one in chunks if name == b"IDAT")
        try:
            rows = zlib.decompress(packed)
        except zlib.error:
            rows = packed
        place_of = next((number for number, one in enumerate(chunks) if one[0] == b"IDAT"), 0)
        chunks = [one for one in chunks if one[0] != b"IDAT"]
        chunks.insert(place_of, (b"IDAT", zlib.compress(blind(rows, rng), 1)))
    elif way == "bomb":
        packed = zlib.compress(bytes(int(rng.integers(1, 40)) << 20), 1)
        name, prefix = pick(
            rng,
            ((b"zTXt", b"k\0\0"), (b"iCCP", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0"), (b"IDAT", b""), (b"fdAT", b"\0" * 4)),
        )
        chunks.insert(pick(rng, (1, which)), (name, prefix + packed))
    elif way == "add":
        name = pick(
            rng, (b"tRNS", b"PLTE", b"gAMA", b"cHRM", b"pHYs", b"eXIf", b"acTL", b"fcTL", b"sRGB", b"tIME", b"bKGD")
        )
        chunks.insert(pick(rng, (0, 1, 1, which)), (name, rng.bytes(pick(rng, (0, 1, 2, 4, 6, 8, 9, 26, 256, 768)))))
    elif way == "drop":
        del chunks[which]
    elif way == "twice":
        chunks[which:which] = [chunks[which]] * int(rng.integers(1, 5))
    elif way == "swap":
        other = int(rng.integers(len(chunks)))
        chunks[which], chunks[other] = chunks[other], chunks[which]
    made = [chunk(*one) for one in chunks]
    if way == "length":
        made[which % len(made)] = extreme(rng, 4).to_bytes(4, "big") + made[which % len(made)][4:]
    return data[:8] + b"".join(made)


# --- JPEG and JPEG-LS: segments ---


def jpeg(data: bytes, rng: Rng) -> bytes:
    segments, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        length = 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        segments.append(data[at : at + length])
        at += length
    rest = data[at:]
    frames = [n for n, one in enumerate(segments) if 0xC0 <= one[1] <= 0xCF and one[1] not in (0xC4, 0xC8, 0xCC)]
    frames += [n for n, one in enumerate(segments) if one[1] == 0xF7]
    way = pick(
        rng, ("frame", "frame", "tables", "tables", "scan", "scans", "add", "drop", "twice", "swap", "length", "coded")
    )
    if not segments or (way == "frame" and not frames):
        return blind(data, rng)
    which = int(rng.integers(len(segments)))
    if way == "frame":
        which = frames[0]
        segment = bytearray(segments[which].ljust(20, b"\0"))
        offset = int(rng.integers(1, 14))
        if offset in (5, 7):  # height, width
            segment[offset : offset + 2] = extreme(rng, 2).to_bytes(2, "big")
        elif offset == 1:
            segment[1] = 0xC0 + pick(rng, (0, 1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15))
        elif offset == 11:  # sampling factors
            segment[11] = pick(rng, (0x11, 0x21, 0x12, 0x22, 0x44, 0x14, 0x41, 0x00, 0xFF))
        else:
            segment[offset] = extreme(rng, 1)
        segments[which] = bytes(segment[: len(segments[which])])
    elif way == "tables":
        tables = [n for n, one in enumerate(segments) if one[1] in (0xC4, 0xDB, 0xDD, 0xF8)] or [which]
        which = pick(rng, tables)
        segments[which] = segments[which][:4] + blind(segments[which][4:], rng)[: len(segments[which]) - 4]
    elif way == "scan":
        head = 2 + int.from_bytes(rest[2:4], "big")
        rest = rest[:4] + blind(rest[4:head], rng)[: head - 4] + rest[head:]
    elif way == "scans":
        rest = rest[:-2] * int(rng.integers(2, 200)) + rest[-2:]
    elif way == "coded":
        head = 2 + int.from_bytes(rest[2:4], "big")
        rest = rest[:head] + blind(rest[head:], rng)
    elif way == "add":
        orientation = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1" + bytes(
            [0, int(rng.integers(12)), 0, 0, 0, 0, 0, 0]
        )
        marker, body = pick(
            rng,
            (
                (0xE1, blind(orientation, rng)), (0xE1, orientation), (0xEE, b"Adobe\0\x64\0\0\0\0" + rng.bytes(1)),
                (0xE2, b"ICC_PROFILE\0\1\1" + rng.bytes(100)), (0xE2, b"MPF\0" + rng.bytes(60)), (0xDD, rng.bytes(2)),
                (0xDC, rng.bytes(2)), (0xFE, rng.bytes(300)), (0xED, b"Photoshop 3.0\0008BIM" + rng.bytes(40)),
                (0xF8, bytes([pick(rng, (1, 2, 3, 4))]) + rng.bytes(12)),
            ),
        )  # fmt: skip
        segments.insert(which, struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body)
    elif way == "drop":
        del segments[which]
    elif way == "twice":
        segments[which:which] = [segments[which]] * int(rng.integers(1, 400))
    elif way == "swap":
        other = int(rng.integers(len(segments)))
        segments[which], segments[other] = segments[other], segments[which]
    elif way == "length":
        segments[which] = segments[which][:2] + extreme(rng, 2).to_bytes(2, "big") + segments[which][4:]
    return data[:2] + b"".join(segments) + rest


def jpeg_2000(data: bytes, rng: Rng) -> bytes:
    """SIZ and COD fields, tile parts, the coded data."""
    changed = bytearray(data)
    way = pick(rng, ("size", "size", "style", "tile", "blind"))
    if way == "size" and len(changed) > 45:
        offset, size = pick(rng, (*((n, 4) for n in range(8, 40, 4)), (6, 2), (40, 2), (42, 1), (43, 1), (44, 1)))
        changed[offset : offset + size] = extreme(rng, size).to_bytes(size, "big")
    elif way in ("style", "tile") and (start := data.find(b"\xff\x52" if way == "style" else b"\xff\x90")) > 0:
        changed[min(len(data) - 1, start + int(rng.integers(2, 14)))] = extreme(rng, 1)
    else:
        return blind(data, rng)
    return bytes(changed)


# --- TIFF: entries of the directories ---


def tiff(data: bytes, rng: Rng) -> bytes:
    order = "<" if data[:2] == b"II" else ">"
    start = int.from_bytes(data[4:8], "little" if order == "<" else "big")
    if len(data) < start + 2 or data[2:4] not in (b"*\0", b"\0*"):
        return blind(data, rng)
    changed = bytearray(data)
    count = struct.unpack_from(order + "H", data, start)[0]
    at = start + 2 + 12 * int(rng.integers(max(1, min(count, 40))))
    if at + 12 > len(data):
        return blind(data, rng)
    way = pick(rng, ("tag", "type", "count", "value", "value", "tiles", "next", "entries"))
    if way == "tag":
        tags = (
            256,
            257,
            258,
            259,
            262,
            266,
            273,
            274,
            277,
            278,
            279,
            284,
            317,
            320,
            322,
            323,
            324,
            338,
            339,
            34665,
            700,
        )
        struct.pack_into(order + "H", changed, at, pick(rng, tags))
    elif way == "type":
        struct.pack_into(order + "H", changed, at + 2, int(rng.integers(20)))
    elif way == "count":
        struct.pack_into(order + "I", changed, at + 4, extreme(rng, 4))
    elif way == "value":
        struct.pack_into(order + "I", changed, at + 8, extreme(rng, 4))
    elif way == "tiles":
        tile = struct.pack(order + "HHII", pick(rng, (322, 323, 278, 284)), 4, 1, extreme(rng, 4))
        changed[at : at + 12] = tile
    elif way == "next" and start + 6 + 12 * count <= len(data):
        struct.pack_into(
            order + "I", changed, start + 2 + 12 * count, pick(rng, (start, 8, 0, len(data), extreme(rng, 4)))
        )
    else:
        struct.pack_into(order + "H", changed, start, extreme(rng, 2))
    return bytes(changed)
