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
# JSON integers beyond 2^63 - 1 are not met in practice; msgspec's bounds are signed 64-bit.
U64 = Annotated[int, msgspec.Meta(ge=0, le=0x7FFF_FFFF_FFFF_FFFF)]


class Resource(msgspec.Struct, forbid_unknown_fields=True):
    """Base of the resources that refuse a field they do not know."""
