"""The metadata document: a JSON tree that the host replaces and patches, and both sides read.

One thread writes, the one that gives the controller's commands; any thread may read at any time, without a lock: a
tree is never changed once it is in place, a patch makes a new one that shares what stayed.
"""

from __future__ import annotations

import msgspec

from crackle.errors import ConfigError, TooLargeError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Levels of nesting that a document may have.
MAX_DEPTH = 127


class NotFoundError(Exception):
    """There is nothing at that path."""


class UnsupportedError(Exception):
    """What is at that path has no form in the text that was asked for."""


class Store:
    """The document of one microVM, of at most `limit` bytes as compact JSON."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._tree: Any = None
        self._written = False

    def put(self, document: Any) -> None:
        """Replace the document. TooLargeError or ConfigError leave the old one in place."""
        self._take(_ordered(document))

    def patch(self, patch: Any) -> None:
        """Apply a JSON merge patch (RFC 7396) to the document, all of it or nothing. Raises as `put` does."""
        if not self._written:
            raise ConfigError("The MMDS data store is not initialized.")
        self._take(merged(self._tree, _ordered(patch)))

    def get(self) -> Any:
        """The document; an empty object before there is one."""
        return {} if self._tree is None else self._tree

    def text(self, path: str, *, as_json: bool) -> str:
        """What is at `path`, as JSON, or in the form of EC2's metadata: a string, or an object's keys one a line.

        A key that leads to another object ends in a slash there. NotFoundError, UnsupportedError.
        """
        value = find(self._tree, path.removesuffix("/"))
        if as_json:
            return msgspec.json.encode(value).decode()
        if isinstance(value, dict):
            return "\n".join(f"{key}/" if isinstance(item, dict) else key for key, item in value.items())
        if isinstance(value, str):
            return value
        raise UnsupportedError

    def _take(self, tree: Any) -> None:
        if len(msgspec.json.encode(tree)) > self.limit:
            raise TooLargeError("The MMDS patch request doesn't fit.")
        self._tree = tree
        self._written = True


def merged(target: Any, patch: Any) -> Any:
    """`target` after the JSON merge patch `patch` (RFC 7396); neither is changed, and the keys are sorted."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return {key: result[key] for key in sorted(result)}


def find(tree: Any, pointer: str) -> Any:
    """What the JSON pointer (RFC 6901) leads to in `tree`; NotFoundError."""
    if not pointer:
        return tree
    first, *steps = pointer.split("/")
    if first:
        raise NotFoundError
    for step in steps:
        if isinstance(tree, dict):
            key = step.replace("~1", "/").replace("~0", "~")
            if key not in tree:
                raise NotFoundError
            tree = tree[key]
        elif isinstance(tree, list) and _is_index(step) and int(step) < len(tree):
            tree = tree[int(step)]
        else:
            raise NotFoundError
    return tree


def _is_index(step: str) -> bool:
    return step.isascii() and step.isdecimal() and (step == "0" or step[0] != "0") and len(step) < 10


def _ordered(value: Any, depth: int = 0) -> Any:
    """`value` with sorted keys in every object, as listings show them. ConfigError if it is nested too deeply."""
    if depth == MAX_DEPTH and isinstance(value, dict | list):
        raise ConfigError(f"The metadata is nested more than {MAX_DEPTH} levels deep.")
    if isinstance(value, dict):
        return {key: _ordered(value[key], depth + 1) for key in sorted(value)}
    if isinstance(value, list):
        return [_ordered(item, depth + 1) for item in value]
    return value
