from typing import ClassVar

import msgspec

from crackle.memory.guest import GuestMemory
from crackle.ratelimit.limiter import RateLimiter
from crackle.ratelimit.state import LimiterState
from crackle.schema.rate_limiter import RateLimiter as Limits
from crackle.virtio.device import VirtioDevice

class RngState(msgspec.Struct, frozen=True, kw_only=True, tag="entropy"):
    limiter: LimiterState

class Rng(VirtioDevice):
    own_state: ClassVar[type[msgspec.Struct] | None]
    @property
    def limiter(self) -> RateLimiter: ...
    @property
    def requests(self) -> int: ...
    @property
    def given_bytes(self) -> int: ...
    @property
    def fails(self) -> int: ...
    @property
    def host_fails(self) -> int: ...
    @property
    def throttled(self) -> int: ...
    def __init__(self, memory: GuestMemory, *, limiter: Limits | None = None) -> None: ...
