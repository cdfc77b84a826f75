"""Changes to bytes whatever they mean; the same generator gives the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Rng = np.random.Generator
Mutation = Callable[[bytes, Rng], bytes]

EXTREMES = (0, 1, 2, 3, 7, 8, 9, 12, 15, 16, 17, 32, 63, 64, 127, 128, 255, 256, 4095, 8191, 32767, 32768, 65534, 65535)
LARGE = (65536, 1 << 20, (1 << 28) - 1, 1 << 28, (1 << 31) - 1, 1 << 31, (1 << 32) - 2, (1 << 32) - 1)


def pick(rng: Rng, choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def extreme(rng: Rng, size: int) -> int:
    """A number that programmers forget, below ``256**size``."""
    number = pick(rng, EXTREMES if size < 4 or rng.random() < 0.5 else LARGE)
    return number % 256**size


def place(rng: Rng, length: int, head: float = 0.5) -> int:
    """An offset below ``length``, with probability ``head`` within the first 600: headers steer the decoders."""
    return int(rng.integers(max(1, min(length, 600) if rng.random() < head else length)))


def flip_bits(data: bytes, rng: Rng) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 9)) if data else 0):
        changed[place(rng, len(data))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def fill_run(data: bytes, rng: Rng) -> bytes:
    at, length = place(rng, len(data)), int(rng.integers(1, 65))
    run = pick(rng, (bytes(length), b"\xff" * length, rng.bytes(length)))
    return data[:at] + run + data[at + length :]


def truncate(data: bytes, rng: Rng) -> bytes:
    return data[: place(rng, len(data), 0.3)]


def insert(data: bytes, rng: Rng) -> bytes:
    at = place(rng, len(data))
    return data[:at] + rng.bytes(int(rng.integers(1, 200))) + data[at:]


def duplicate(data: bytes, rng: Rng) -> bytes:
    at, length = place(rng, len(data)), int(rng.integers(1, 2000))
    return data[:at] + data[at : at + length] * int(rng.integers(2, 20)) + data[at + length :]


def remove(data: bytes, rng: Rng) -> bytes:
    at = place(rng, len(data))
    return data[:at] + data[at + int(rng.integers(1, 300)) :]


def overwrite_number(data: bytes, rng: Rng) -> bytes:
    size, at = pick(rng, (1, 2, 4, 8)), place(rng, len(data), 0.7)
    return data[:at] + extreme(rng, size).to_bytes(size, pick(rng, ("little", "big"))) + data[at + size :]


BLIND: tuple[Mutation, ...] = (flip_bits, fill_run, truncate, insert, duplicate, remove, overwrite_number)


def blind(data: bytes, rng: Rng) -> bytes:
    return pick(rng, BLIND)(data, rng)
