"""Which tensor of a larger network a tensor of a smaller one corresponds to, by their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

BLOCKS = ("transformer_blocks", "single_transformer_blocks", "blocks", "layers")


def evenly(count: int, of: int) -> list[int]:
    """`count` positions among `of`, evenly spaced, the first and the last among them."""
    if count == 1:
        return [0]
    return [round(i * (of - 1) / (count - 1)) for i in range(count)]


def counterparts(names: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """For each name its counterpart among the others; names without one are left out.

    In two lists of modules with the same length, positions correspond. Otherwise a UNet's stages
    correspond from the outside in; in a stage up, the last block takes the last block (arXiv
    2305.15798, sec. 3.1) and the others take the first ones; blocks of a transformer are evenly
    spaced.
    """
    names, others = list(names), set(others)
    own, theirs = _lists(names), _lists(others)
    found = {name: _counterpart(name, own, theirs) for name in names}
    return {name: other for name, other in found.items() if other in others}


def _lists(names: Iterable[str]) -> dict[str, int]:
    """How many modules each list holds, by the list's name."""
    members: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                members.setdefault(".".join(parts[:i]), set()).add(part)
    return {name: len(found) for name, found in members.items()}


def _counterpart(name: str, own: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    parts, mapped = name.split("."), list[str]()
    for i, part in enumerate(parts):
        if part.isdigit():
            count, of = own[".".join(parts[:i])], theirs.get(".".join(mapped), 0)
            part = str(_position(parts[:i], int(part), count, of))
        mapped.append(part)
    return ".".join(mapped)


def _position(path: list[str], i: int, count: int, of: int) -> int:
    if count == of:
        return i
    if path == ["up_blocks"]:
        return i + of - count
    if path[0] == "up_blocks" and path[-1] in ("resnets", "attentions"):
        return of - 1 if i == count - 1 else i if i < of - 1 else -1
    if path[-1] in BLOCKS and count < of:
        return evenly(count, of)[i]
    return i
