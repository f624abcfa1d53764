"""Writes GGUF files with ``pop.*`` keys byte by byte: valid ones, and ones with up to five faults.

The fuzzers of metadata and of the native library use this module, and so does tests/commands/test_properties.py.
``gguf.GGUFWriter`` refuses to write most of these files.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field, replace

from gguf import GGUFValueType as Kind

N_LAYER = 6
_SIZES = {
    Kind.UINT8: 1,
    Kind.INT8: 1,
    Kind.BOOL: 1,
    Kind.UINT16: 2,
    Kind.INT16: 2,
    Kind.UINT32: 4,
    Kind.INT32: 4,
    Kind.FLOAT32: 4,
    Kind.UINT64: 8,
    Kind.INT64: 8,
    Kind.FLOAT64: 8,
}
_EDGES = [
    0,
    1,
    2,
    5,
    6,
    7,
    12,
    31,
    127,
    255,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**60,
    2**63 - 1,
    2**63,
    2**64 - 1,
]
_FLOATS = [float("nan"), float("inf"), float("-inf"), -0.0, -1.0, 1e-45, 3e38, 0.5]
_TEXTS = [
    b"",
    b"bundled",
    b"lossless",
    b"4",
    b"-1",
    b" 4",
    b"1e9",
    b"nan",
    b"\xff\xfe",
    b"\xc3\x9f",
    b"\0",
    b"a\nb",
    b"\x1b[2J",
    b"%s%n{}",
]
_NAMES = [
    b"pop.",
    b"pop",
    b"POP.boundary",
    b"pop.boundary ",
    b"pop.colour",
    b"",
    b"\xff",
    b"pop.\xff",
    b"a\nb",
    b"general.alignment",
    b"general.file_type",
    b"general.name",
    b"llama.nextn_predict_layers",
    b"pop.curve.kl",
]


@dataclass(frozen=True)
class Key:
    """A key, the number of its type, and the bytes that follow the type."""

    name: bytes
    kind: int
    value: bytes


@dataclass(frozen=True)
class File:
    """The parts of a GGUF file.

    Attributes:
        keys: The keys in order.
        infos: Names, shapes, types and offsets of the tensors.
        n_tensors: Number of entries in ``infos``.
        data: The tensors.
        order: Byte order, as in the module struct.
        version: Version of GGUF.
        n_keys: Claimed number of keys; None claims the true one.
        claimed_tensors: Claimed number of tensors; None claims the true one.
        alignment: Alignment of ``data``.
        damage: For each change of the header: what is done, where, and a number for it.
    """

    keys: list[Key]
    infos: bytes = b""
    n_tensors: int = 0
    data: bytes = b""
    order: str = "<"
    version: int = 3
    n_keys: int | None = None
    claimed_tensors: int | None = None
    alignment: int = 32
    damage: list[tuple[str, int, int]] = field(default_factory=list)

    def header(self) -> bytes:
        """Returns all that stands before the tensor data, padded."""
        n_keys = len(self.keys) if self.n_keys is None else self.n_keys
        n_tensors = self.n_tensors if self.claimed_tensors is None else self.claimed_tensors
        raw = b"GGUF" + struct.pack(f"{self.order}IQQ", self.version, n_tensors, n_keys)
        for key in self.keys:
            raw += (
                struct.pack(f"{self.order}Q", len(key.name))
                + key.name
                + struct.pack(f"{self.order}I", key.kind)
                + key.value
            )
        raw += self.infos
        return raw + bytes(-len(raw) % self.alignment)

    def bytes(self) -> bytes:
        raw = bytearray(self.header())
        for action, at, what in self.damage:
            at = 4 + at % max(1, len(raw) - 4)  # the magic has tests of its own
            if action == "byte":
                raw[at : at + 1] = bytes([what & 0xFF])
            elif action == "number":
                raw[at : at + 8] = struct.pack(f"{self.order}Q", what)
            elif action == "small number":
                raw[at : at + 4] = struct.pack(f"{self.order}I", what & 0xFFFFFFFF)
            elif action == "insert":
                raw[at:at] = what.to_bytes(8, "little")
            elif action == "delete":
                del raw[at : at + 1 + what % 8]
            elif action == "cut":
                return bytes(raw[:at])
        return bytes(raw) + self.data


def valid(chance: random.Random, order: str = "<", n_layer: int = N_LAYER, architecture: bytes = b"llama") -> list[Key]:
    """Returns architecture, number of layers and any of the ``pop.*`` keys, all as docs/metadata.md allows them."""

    def small(low: int) -> bytes:
        choices = [low, 1, 2, chance.randint(low, 99), chance.randrange(low, 2**31)]
        return number(Kind.UINT32, chance.choice(choices), order)

    def scores(count: int) -> bytes:
        values = [chance.random() * 10.0 ** chance.randint(-9, 9) for _ in range(count)]
        return array(Kind.FLOAT32, [real(Kind.FLOAT32, value, order) for value in values], order)

    n_curve = chance.randint(0, 5)
    curve = {
        b"pop.curve.boundary": (
            Kind.ARRAY,
            array(Kind.UINT32, [number(Kind.UINT32, chance.randint(1, n_layer), order) for _ in range(n_curve)], order),
        ),
        b"pop.curve.kl": (Kind.ARRAY, scores(n_curve)),
        b"pop.curve.loss_increase": (Kind.ARRAY, scores(n_curve)),
        b"pop.curve.speedup": (Kind.ARRAY, scores(n_curve)),
        b"pop.curve.samples": (Kind.UINT32, small(0)),
        b"pop.curve.source": (Kind.STRING, string(b"held-out.jsonl", order)),
    }
    others = {
        b"pop.boundary": (Kind.UINT32, number(Kind.UINT32, chance.randint(1, n_layer), order)),
        b"pop.head": (Kind.UINT32, small(0)),
        b"pop.tail": (Kind.UINT32, small(1)),
        b"pop.min_tokens": (Kind.UINT32, small(0)),
        b"pop.importance.prefill": (Kind.ARRAY, scores(n_layer)),
        b"pop.importance.decode": (Kind.ARRAY, scores(n_layer)),
        b"pop.calibration.source": (Kind.STRING, string("märchen.txt".encode(), order)),
        b"pop.calibration.samples": (Kind.UINT32, small(0)),
        b"pop.calibration.tokens": (Kind.UINT32, number(Kind.UINT32, chance.randrange(2**32), order)),
        b"pop.calibration.seed": (Kind.UINT32, small(0)),
        b"pop.calibration.sha256": (Kind.STRING, string(b"ab" * 32, order)),
    }
    share = chance.random()
    keys = [Key(name, *value) for name, value in others.items() if chance.random() < share]
    if chance.random() < share:
        keys += [Key(name, *value) for name, value in curve.items()]
    chance.shuffle(keys)
    fixed = [
        Key(b"general.architecture", Kind.STRING, string(architecture, order)),
        Key(architecture + b".block_count", Kind.UINT32, number(Kind.UINT32, n_layer, order)),
        Key(b"pop.version", Kind.UINT32, number(Kind.UINT32, 1, order)),
    ]
    return fixed + keys


def tensor(name: bytes, shape: list[int], kind: int, offset: int, order: str = "<") -> bytes:
    """Returns an entry of the tensor infos."""
    return string(name, order) + struct.pack(f"{order}I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def mutated(chance: random.Random, file: File, only_pop: bool = False) -> File:
    """Returns the file with none to five faults.

    ``only_pop`` changes nothing but ``pop.*`` keys, so that llama.cpp still loads most of the files.
    """
    for _ in range(chance.choice([0, 1, 1, 1, 2, 2, 3, 5])):
        keys = list(file.keys)
        open_to = [i for i, key in enumerate(keys) if key.name.startswith(b"pop.") or not only_pop]
        at = chance.choice(open_to) if open_to else None
        fault = chance.choices(range(11), [6, 6, 2, 2, 2, 2, 3, 1, *([0] * 3 if only_pop else [2, 4, 1])])[0]
        if fault == 0 and at is not None:  # another value of the same type
            kind = Kind(keys[at].kind) if keys[at].kind in list(Kind) else Kind.UINT8
            keys[at] = replace(keys[at], value=value(chance, kind, file.order))
        elif fault == 1 and at is not None:  # another type
            kind = chance.choice(list(Kind))
            keys[at] = replace(keys[at], kind=kind, value=value(chance, kind, file.order))
        elif fault == 2 and at is not None:
            del keys[at]
        elif fault == 3 and at is not None:
            keys.insert(chance.randint(0, len(keys)), keys[at])
        elif fault == 4 and not only_pop:
            chance.shuffle(keys)
        elif fault == 5:  # an unknown key
            kind = chance.choice(list(Kind))
            name = b"pop.unknown" if only_pop else chance.choice(_NAMES)
            keys.append(Key(name, kind, value(chance, kind, file.order)))
        elif fault == 6 and at is not None and len(keys[at].value) >= 12:  # a wrong length or count
            claimed = struct.pack(f"{file.order}Q", chance.choice(_EDGES))
            start = 4 if keys[at].kind == Kind.ARRAY else 0
            if not only_pop:
                keys[at] = replace(keys[at], value=keys[at].value[:start] + claimed + keys[at].value[start + 8 :])
        elif fault == 7 and at is not None:  # a number that is no type
            keys[at] = replace(keys[at], kind=keys[at].kind if only_pop else chance.choice([13, 99, 2**32 - 1]))
        elif fault == 8:
            name = chance.choice(["n_keys", "claimed_tensors", "version", "order", "alignment"])
            wrong = {
                "version": chance.choice([0, 1, 2, 3, 4, 2**16, 2**32 - 1]),
                "order": chance.choice("<>"),
                "alignment": 8,
            }
            file = replace(file, **{name: wrong.get(name, chance.choice(_EDGES))})
        elif fault == 9:
            action = chance.choice(["byte", "byte", "number", "small number", "insert", "delete", "cut"])
            what = chance.choice(_EDGES) if chance.random() < 0.7 else chance.getrandbits(64)
            file = replace(file, damage=[*file.damage, (action, chance.getrandbits(20), what)])
        elif fault == 10:  # a very long value
            count = chance.choices([1000, 65536, 2**20], [90, 8, 2])[0]
            item = chance.choice([Kind.UINT8, Kind.FLOAT32, Kind.UINT32])
            raw = struct.pack(f"{file.order}IQ", item, count) + bytes(count * _SIZES[item])
            keys.append(Key(chance.choice([b"pop.importance.prefill", b"pop.curve.boundary", b"x"]), Kind.ARRAY, raw))
        file = replace(file, keys=keys)
    return file


def value(chance: random.Random, kind: Kind, order: str, depth: int = 0) -> bytes:
    """Returns any value of a type, mostly one at the edge of its range."""
    if kind == Kind.STRING:
        return string(
            chance.choice(_TEXTS) if chance.random() < 0.8 else chance.randbytes(chance.choice([1, 40, 400])), order
        )
    if kind == Kind.ARRAY:
        item = chance.choice(list(Kind) if depth < 3 else list(_SIZES))
        count = chance.choice([0, 1, 2, 5, 6, 7, 12])
        return array(item, [value(chance, item, order, depth + 1) for _ in range(count)], order)
    if kind in (Kind.FLOAT32, Kind.FLOAT64) and chance.random() < 0.7:
        return real(kind, chance.choice(_FLOATS), order)
    return number(kind, chance.choice(_EDGES) if chance.random() < 0.8 else chance.getrandbits(64), order)


def number(kind: Kind, bits: int, order: str) -> bytes:
    return (bits % 2 ** (8 * _SIZES[kind])).to_bytes(_SIZES[kind], "little" if order == "<" else "big")


def real(kind: Kind, number: float, order: str) -> bytes:
    return struct.pack(order + ("f" if kind == Kind.FLOAT32 else "d"), number)


def string(raw: bytes, order: str) -> bytes:
    return struct.pack(f"{order}Q", len(raw)) + raw


def array(kind: Kind, items: list[bytes], order: str) -> bytes:
    return struct.pack(f"{order}IQ", kind, len(items)) + b"".join(items)
