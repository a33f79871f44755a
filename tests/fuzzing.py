"""Seeded damage to files: the same for the same number, in every process."""

import copy
import json
import math
import random

DEEP = 200
HOSTILE = [
    None, True, False, -1, 0, 1, 3, 1.5, -0.5, 1e308, 10**5, 10**9, 10**30, -(10**30), math.nan,
    math.inf, "", "..", "../../secret", "/etc/passwd", "a'b\"c\nd", "b=open('x', 'w')", "{{ 1 }}",
    "x" * 10_000, "1", "nan", "\0", "é\u2028", [], {}, [None], [[]], [[[[[[]]]]]], {"a": 1},
    [1] * 1000, [10**6, 10**6], ["a", "b"], ["os", "system"], [None, None], [True, -1], [0, 0],
    "StableDiffusionPipeline", "UNet2DModel", "DDPMScheduler", "OwnNetwork", "os:system",
]  # fmt: skip


def nodes(value, path=()):
    """The places in a JSON value, from the outside in."""
    yield path
    if isinstance(value, (dict, list)):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in list(entries)[:50]:
            yield from nodes(inner, (*path, key))


def deep(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    return value


def put(root, path, value):
    """The root with a value at a place."""
    if not path:
        return value
    at = root
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return root


def get(root, path):
    for key in path:
        root = root[key]
    return root


def delete(root, path):
    if path:
        del get(root, path[:-1])[path[-1]]
        return root
    return {}


def rename(root, path, chooser):
    """A key of the object at, or around, a place gets another name."""
    holder = get(root, path[:-1]) if path else root
    if not isinstance(holder, dict) or not holder:
        return root
    key = chooser.choice(sorted(holder))
    holder[str(chooser.choice(HOSTILE))[:100]] = holder.pop(key)
    return root


def mutated_json(text, chooser):
    """JSON with one to three of its values changed."""
    root = json.loads(text)
    for _ in range(chooser.choice((1, 1, 1, 2, 3))):
        path = chooser.choice(list(nodes(root))[1:] or [()]) if chooser.random() > 0.03 else ()
        kind = chooser.random()
        if kind < 0.7:
            root = put(root, path, copy.deepcopy(chooser.choice(HOSTILE)))
        elif kind < 0.8:
            root = delete(root, path)
        elif kind < 0.9:
            root = rename(root, path, chooser)
        elif kind < 0.95:
            root = put(root, path, deep(chooser.choice((10, DEEP))))
        else:
            old = get(root, path)
            root = put(root, path, [old] if chooser.random() < 0.5 else {"a": old})
        if not isinstance(root, (dict, list)):
            break
    return json.dumps(root).encode()


def mutated_bytes(data, chooser):
    """Bytes cut off, flipped, inserted, repeated or replaced."""
    kind = chooser.randrange(6)
    if kind == 0:
        return data[: chooser.randrange(len(data) + 1)]
    if kind == 1:
        flipped = bytearray(data)
        for _ in range(chooser.choice((1, 3, 30))):
            at = chooser.randrange(min(len(flipped), chooser.choice((64, 2000, 10**9))))
            flipped[at] ^= 1 << chooser.randrange(8)
        return bytes(flipped)
    if kind == 2:
        at = chooser.randrange(len(data) + 1)
        return data[:at] + chooser.randbytes(chooser.choice((1, 8, 100))) + data[at:]
    if kind == 3:
        return chooser.randbytes(chooser.choice((0, 1, 100)))
    if kind == 4:
        return b"[" * 100_000
    return b'{"a":' * DEEP + b"1" + b"}" * DEEP


def mutated(data, number, is_json):
    """What a file holds after damage number `number`."""
    chooser = random.Random(number)
    if is_json and chooser.random() < 0.85:
        return mutated_json(data.decode(), chooser)
    return mutated_bytes(data, chooser)
