"""The session tokens of the metadata service's version 2: made and checked without keeping any of them.

A token is a nonce, the time at which it expires, and a keyed BLAKE2b (RFC 7693) over both, as base64. The key is
random and made with the service, so a token is worth nothing to another microVM or after a restore.
"""

from __future__ import annotations

import os
import time

# The C modules themselves: hashlib and hmac load OpenSSL, which costs 4 ms and 4 MB.
from _blake2 import blake2b
from _operator import _compare_digest
from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64

MIN_TTL_S = 1
MAX_TTL_S = 21600

_KEY_SIZE = 32
_NONCE_SIZE = 12
_EXPIRY_SIZE = 8
_TAG_SIZE = 16
_TOKEN_SIZE = 48  # of the base64 text


class TokenAuthority:
    """Makes tokens, and tells its own that have not expired from everything else."""

    def __init__(self) -> None:
        self._key = os.urandom(_KEY_SIZE)
        # Times count from here: how long the host has been up is no business of the guest's.
        self._birth_ns = time.monotonic_ns()

    def issue(self, ttl_s: int) -> str:
        """A token that is valid for `ttl_s` seconds. ValueError unless that is MIN_TTL_S to MAX_TTL_S."""
        if not MIN_TTL_S <= ttl_s <= MAX_TTL_S:
            raise ValueError(
                f"Invalid time to live value provided for token: {ttl_s}. "
                f"Please provide a value between {MIN_TTL_S} and {MAX_TTL_S}."
            )
        expiry = self._now_ms() + ttl_s * 1000
        claim = os.urandom(_NONCE_SIZE) + expiry.to_bytes(_EXPIRY_SIZE, "big")
        return b2a_base64(claim + self._tag(claim), newline=False).decode()

    def is_valid(self, token: str) -> bool:
        """Whether this authority made `token` and its time is not over. Any text may be given."""
        if len(token) != _TOKEN_SIZE or not token.isascii():
            return False
        try:
            raw = a2b_base64(token, strict_mode=True)
        except Base64Error:
            return False
        claim, tag = raw[:-_TAG_SIZE], raw[-_TAG_SIZE:]
        if not _compare_digest(tag, self._tag(claim)):
            return False
        return int.from_bytes(claim[_NONCE_SIZE:], "big") > self._now_ms()

    def _tag(self, claim: bytes) -> bytes:
        tag: bytes = blake2b(claim, key=self._key, digest_size=_TAG_SIZE).digest()
        return tag

    def _now_ms(self) -> int:
        return (time.monotonic_ns() - self._birth_ns) // 1_000_000
