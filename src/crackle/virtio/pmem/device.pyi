from typing import ClassVar

import msgspec

from crackle.memory.guest import GuestMemory
from crackle.ratelimit.limiter import RateLimiter
from crackle.ratelimit.state import LimiterState
from crackle.schema.rate_limiter import RateLimiter as Limits
from crackle.virtio.device import VirtioDevice

class PmemState(msgspec.Struct, frozen=True, kw_only=True, tag="pmem"):
    start: int
    size: int
    limiter: LimiterState

class Pmem(VirtioDevice):
    own_state: ClassVar[type[msgspec.Struct] | None]
    @property
    def limiter(self) -> RateLimiter: ...
    @property
    def read_only(self) -> bool: ...
    @property
    def length(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def hva(self) -> int: ...
    @property
    def gpa(self) -> int: ...
    @property
    def flushes(self) -> int: ...
    @property
    def fails(self) -> int: ...
    @property
    def throttled(self) -> int: ...
    def __init__(
        self,
        memory: GuestMemory,
        fd: int,
        length: int,
        *,
        read_only: bool = False,
        limiter: Limits | None = None,
    ) -> None: ...
