"""JSON text to a resource, with errors that name the field, the value's type and what was expected."""

from __future__ import annotations

from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from crackle.errors import ConfigError
from crackle.schema.net import MAC_PATTERN

T = TypeVar("T")

# Characters of a wrong value that a message repeats.
_SHOWN_VALUE = 80

_decoders: dict[type, msgspec.json.Decoder[Any]] = {}

# msgspec's openings, and the words clients of this API already look for.
_WORDING = (
    ("Object missing required field ", "missing field "),
    ("Object contains unknown field ", "unknown field "),
    ("Invalid enum value ", "unknown variant "),
)
# How it opens where a text does not match a pattern, which says nothing to who reads the message.
_PATTERN = "Expected `str` matching regex "
# How what is wrong with a logger's level begins, which is checked by the Struct itself.
_LEVEL = "Invalid LevelFilter"


def decode(data: bytes, resource: type[T]) -> T:
    """``data`` as a ``resource``; raises msgspec.DecodeError, which :func:`explain` puts into words."""
    try:
        value: T = decoder_of(resource).decode(data)
    except UnicodeDecodeError as error:
        raise msgspec.DecodeError(f"JSON is malformed: it is not UTF-8 ({error.reason})") from None
    except RecursionError:
        raise msgspec.DecodeError("JSON is malformed: it is nested too deeply") from None
    return value


def decoder_of(resource: type[T]) -> msgspec.json.Decoder[T]:
    """The one of this type, which is made when it is first wanted."""
    decoder = _decoders.get(resource)
    if decoder is None:
        decoder = _decoders[resource] = msgspec.json.Decoder(resource)
    return decoder


def unknown_fields(data: bytes, resource: type[msgspec.Struct]) -> list[str]:
    """The keys of an object that decodes as a `resource`, one that ignores them, and are no fields of it."""
    given: dict[str, Any] = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    return [name for name in given if name not in resource.__struct_encode_fields__]


def validated(resource: T) -> T:
    """A copy of `resource`, a Struct made in Python, as if it had come as JSON. ConfigError where that would fail."""
    return made(type(resource), _plain(resource))


def made(kind: type[T], fields: Any) -> T:
    """The Struct of these fields, as if they had come as JSON. ConfigError where that would fail."""
    plain = _plain(fields)
    try:
        value: T = msgspec.convert(plain, kind)
    except msgspec.ValidationError as error:
        try:
            text = msgspec.json.encode(plain)
        except (TypeError, ValueError, OverflowError):
            text = b""
        # There is no text that somebody wrote, so no place in it either.
        raise ConfigError(f"{_phrase(error, kind, text)}.") from None
    return value


def _plain(value: Any) -> Any:
    """`value` with JSON's objects and arrays for Structs and sequences, whatever else is in them."""
    if isinstance(value, msgspec.Struct):
        names = zip(value.__struct_encode_fields__, value.__struct_fields__, strict=True)
        fields = {encoded: getattr(value, name) for encoded, name in names}
        return {name: _plain(field) for name, field in fields.items() if field is not msgspec.UNSET}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(field) for name, field in value.items()}
    return value


def check_id(identifier: str) -> None:
    """ConfigError unless it can name a resource."""
    if not identifier:
        raise ConfigError("The ID cannot be empty.")
    if not all(character == "_" or character.isalnum() for character in identifier):
        raise ConfigError("API Resource IDs can only contain alphanumeric characters and underscores.")


_NO_MAC = (
    "The provided MAC address is invalid: six pairs of hexadecimal digits with colons between them are one"
)


def explain(error: msgspec.DecodeError, resource: type | None = None, data: bytes = b"") -> str:
    """One phrase without a final stop: the field, what is wrong with it, and what is allowed there.

    With `data`, the text that did not decode, it also says which value was given, and where.
    """
    phrase = _phrase(error, resource, data)
    at = _offset(error, data) if data else None
    if at is None:
        return phrase
    from crackle.schema.position import line_and_column

    line, column = line_and_column(data, at)
    where = f" at line {line} column {column}"
    if phrase.startswith(_LEVEL):
        # Firecracker's sentence ends here.
        return f"{_LEVEL}{where}{phrase.removeprefix(_LEVEL)}"
    return f"{phrase.partition(' (byte ')[0]}{where}"


def _phrase(error: msgspec.DecodeError, resource: type | None, data: bytes) -> str:
    text, _, path = str(error).partition(" - at ")
    if text.startswith(_LEVEL):
        return text.rstrip(".")
    if text.startswith(_PATTERN):
        text = _NO_MAC if MAC_PATTERN in text else "invalid syntax"
    for opening, wording in _WORDING:
        if text.startswith(opening):
            text = wording + text.removeprefix(opening).replace("'", "`")
            if resource is not None:
                text += _expected(wording, resource, path.strip("`"))
            break
    else:
        if path and data:
            return f"{text}, at {path}{_given(data, path.strip('`'))}"
    return f"{text}, at {path}" if path else text


def _offset(error: msgspec.DecodeError, data: bytes) -> int | None:
    """Where in `data` it is."""
    from crackle.schema.position import offset_of

    text, _, path = str(error).partition(" - at ")
    if "truncated" in text:
        return len(data)
    _, _, byte = text.partition(" (byte ")
    if byte:
        return int(byte.rstrip(")"))
    if text.startswith("JSON is malformed"):
        try:
            data.decode()
        except UnicodeDecodeError as where:
            return where.start
        return None
    if text.startswith(_LEVEL):
        path = f"{path.strip('`') or '$'}.level"
    unknown = text.startswith("Object contains unknown field ")
    return offset_of(data, path.strip("`") or "$", text.split("`")[1] if unknown else None)


def _given(data: bytes, path: str) -> str:
    """What stands at `path`, in brackets; nothing if it is no single value, or a long one."""
    try:
        value: Any = msgspec.json.decode(data)
        for step in path.removeprefix("$").replace("[", ".[").split(".")[1:]:
            value = value[int(step[1:-1])] if step.startswith("[") else value[step]
    except (msgspec.DecodeError, LookupError, RecursionError, TypeError, ValueError):
        return ""
    shown = "" if isinstance(value, dict | list) else msgspec.json.encode(value).decode()
    return f" (given: {shown})" if 0 < len(shown) <= _SHOWN_VALUE else ""


def _expected(wording: str, resource: type, path: str) -> str:
    if wording.startswith("missing"):
        return ""
    hint: Any = resource
    for step in path.removeprefix("$").split(".")[1:]:
        hint = _field_type(_struct_of(hint), step)
    names: tuple[str, ...]
    if wording.startswith("unknown field"):
        struct = _struct_of(hint)
        names = struct.__struct_encode_fields__ if struct is not None else ()
    else:
        names = _literals(hint)
    quoted = [f"`{name}`" for name in names]
    if not quoted:
        return ""
    if len(quoted) <= 2:
        return f", expected {' or '.join(quoted)}"
    return f", expected one of {', '.join(quoted)}"


def _field_type(struct: Any, step: str) -> Any:
    if struct is None:
        return None
    name, bracket, _ = step.partition("[")
    by_encoded = dict(zip(struct.__struct_encode_fields__, struct.__struct_fields__, strict=True))
    hint = get_type_hints(struct).get(by_encoded.get(name, ""))
    return get_args(hint)[0] if bracket and get_args(hint) else hint


def _members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type itself."""
    return (hint,) if get_origin(hint) in (None, Literal, list, dict) else get_args(hint)


def _struct_of(hint: Any) -> Any:
    return next((member for member in _members(hint) if hasattr(member, "__struct_fields__")), None)


def _literals(hint: Any) -> tuple[str, ...]:
    return next((get_args(member) for member in _members(hint) if get_origin(member) is Literal), ())
