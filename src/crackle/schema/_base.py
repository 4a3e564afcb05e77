"""What every resource has in common: unknown fields are refused, integers have the width the API documents.

A resource is a ``msgspec.Struct`` that serves as API request body, configuration-file section, library
argument and ``GET /vm/config`` entry alike. An optional field that is not given is ``None`` (``null``).
"""

from __future__ import annotations

from typing import Annotated

import msgspec

U8 = Annotated[int, msgspec.Meta(ge=0, le=0xFF)]
U16 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
U32 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]
# The upper bound is `check_u64`'s, because msgspec's bounds are signed.
U64 = Annotated[int, msgspec.Meta(ge=0)]


def check_u64(resource: object, *names: str) -> None:
    """ValueError, which msgspec gives a place in the JSON, for a field that does not fit 64 bits."""
    for name in names:
        value = getattr(resource, name)
        if isinstance(value, int) and value > 0xFFFF_FFFF_FFFF_FFFF:
            raise ValueError(f"`{name}` must be an `int` <= {0xFFFF_FFFF_FFFF_FFFF} (given: {value})")


class Resource(msgspec.Struct, forbid_unknown_fields=True):
    """Base of the resources that refuse a field they do not know."""
