"""Session tokens: whose they are, and how long."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crackle.mmds.token import MAX_TTL_S, MIN_TTL_S, TokenAuthority


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The time in nanoseconds, which the test moves."""
    now = [10**15]
    monkeypatch.setattr(time, "monotonic_ns", lambda: now[0])
    return now


@pytest.mark.parametrize("ttl_s", [MIN_TTL_S, 60, MAX_TTL_S])
def test_a_token_is_valid_for_as_long_as_was_asked(clock: list[int], ttl_s: int) -> None:
    authority = TokenAuthority()
    clock[0] += 5 * 10**9
    token = authority.issue(ttl_s)
    clock[0] += ttl_s * 10**9 - 10**6
    assert authority.is_valid(token)
    clock[0] += 10**6
    assert not authority.is_valid(token)


@pytest.mark.parametrize("ttl_s", [0, MAX_TTL_S + 1])
def test_a_lifetime_out_of_range_is_refused(ttl_s: int) -> None:
    with pytest.raises(ValueError, match=f"token: {ttl_s}. Please provide a value between 1 and 21600.$"):
        TokenAuthority().issue(ttl_s)


def test_every_token_is_another() -> None:
    authority = TokenAuthority()
    assert len({authority.issue(60) for _ in range(100)}) == 100


def test_another_microvms_token_is_worth_nothing() -> None:
    assert not TokenAuthority().is_valid(TokenAuthority().issue(60))


def test_a_token_with_one_bit_changed_is_not_valid() -> None:
    authority = TokenAuthority()
    token = authority.issue(60)
    for at in range(len(token)):
        for bit in range(7):
            forged = token[:at] + chr(ord(token[at]) ^ 1 << bit) + token[at + 1 :]
            assert not authority.is_valid(forged)
    assert authority.is_valid(token)


@given(st.text(max_size=80) | st.text(min_size=48, max_size=48) | st.binary(max_size=36).map(bytes.hex))
def test_any_other_text_is_no_token(text: str) -> None:
    assert not TokenAuthority().is_valid(text)


def test_a_token_does_not_tell_how_long_the_host_has_been_up(clock: list[int]) -> None:
    first = TokenAuthority()
    clock[0] += 12345 * 10**9
    second = TokenAuthority()

    def expiry(authority: TokenAuthority) -> bytes:
        from binascii import a2b_base64

        return a2b_base64(authority.issue(60))[12:20]

    assert expiry(second) < expiry(first)
    assert int.from_bytes(expiry(second), "big") == 60_000
