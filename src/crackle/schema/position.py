"""Where in a JSON text (RFC 8259) something is: for messages to who wrote it, when something is wrong with it."""

from __future__ import annotations

_SPACE = b" \t\r\n"
_AFTER_SCALAR = b",]} \t\r\n"


def line_and_column(text: bytes, offset: int) -> tuple[int, int]:
    """Of the byte at `offset`, both from 1 on; columns are bytes."""
    return text.count(b"\n", 0, offset) + 1, offset - text.rfind(b"\n", 0, offset)


def offset_of(text: bytes, path: str, key: str | None = None) -> int | None:
    """Of the value at `path`, as msgspec writes it ("$.drives[0].drive_id"), or of its key `key`; None if not found."""
    at = _skip_space(text, 0)
    for step in path.removeprefix("$").replace("[", ".[").split(".")[1:]:
        found = _element(text, at, int(step[1:-1])) if step[1:-1].isdecimal() else _member(text, at, step)
        if found is None:
            return None
        at = found[1]
    if key is None:
        return at
    found = _member(text, at, key)
    return None if found is None else found[0]


def _skip_space(text: bytes, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _skip_value(text: bytes, at: int) -> int:
    """The offset after the value that begins at `at`."""
    depth = 0
    while at < len(text):
        character = text[at]
        if character == ord('"'):
            at += 1
            while at < len(text) and text[at] != ord('"'):
                at += 2 if text[at] == ord("\\") else 1
            at += 1
        elif character in b"[{":
            depth, at = depth + 1, at + 1
        elif character in b"]}":
            depth, at = depth - 1, at + 1
        elif depth:
            at += 1
        else:
            while at < len(text) and text[at] not in _AFTER_SCALAR:
                at += 1
        if depth == 0:
            break
    return at


def _element(text: bytes, at: int, index: int) -> tuple[int, int] | None:
    """(offset, offset) of an array's element."""
    if text[at : at + 1] != b"[":
        return None
    at = _skip_space(text, at + 1)
    for _ in range(index):
        at = _skip_space(text, _skip_value(text, at))
        if text[at : at + 1] != b",":
            return None
        at = _skip_space(text, at + 1)
    return at, at


def _member(text: bytes, at: int, name: str) -> tuple[int, int] | None:
    """Offsets of key and value of an object's last member with this name, which is the one that counts."""
    if text[at : at + 1] != b"{":
        return None
    found = None
    wanted = b'"%s"' % name.encode()
    at = _skip_space(text, at + 1)
    while text[at : at + 1] == b'"':
        key, end = at, _skip_value(text, at)
        value = _skip_space(text, _skip_space(text, end) + 1)
        if text[key:end] == wanted:
            found = key, value
        at = _skip_space(text, _skip_value(text, value))
        if text[at : at + 1] == b",":
            at = _skip_space(text, at + 1)
    return found
