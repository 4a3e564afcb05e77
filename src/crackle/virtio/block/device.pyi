from typing import ClassVar

import msgspec

from crackle.memory.guest import GuestMemory
from crackle.ratelimit.limiter import RateLimiter
from crackle.ratelimit.state import LimiterState
from crackle.schema.rate_limiter import RateLimiter as Limits
from crackle.virtio.block.backing import Backing
from crackle.virtio.device import VirtioDevice

class BlockState(msgspec.Struct, frozen=True, kw_only=True, tag="block"):
    limiter: LimiterState
    overlay: str | None = None

class Block(VirtioDevice):
    own_state: ClassVar[type[msgspec.Struct] | None]
    @property
    def path(self) -> str: ...
    def below(self) -> tuple[str | None, str | None] | None: ...
    @property
    def size(self) -> int: ...
    @property
    def read_only(self) -> bool: ...
    @property
    def writeback(self) -> bool: ...
    @property
    def limiter(self) -> RateLimiter: ...
    @property
    def read_bytes(self) -> int: ...
    @property
    def write_bytes(self) -> int: ...
    @property
    def execute_fails(self) -> int: ...
    @property
    def invalid_requests(self) -> int: ...
    @property
    def empty_events(self) -> int: ...
    @property
    def updates(self) -> int: ...
    @property
    def update_fails(self) -> int: ...
    @property
    def throttled_events(self) -> int: ...
    @property
    def engine_throttled_events(self) -> int: ...
    @property
    def remaining_requests(self) -> int: ...
    def __init__(
        self,
        memory: GuestMemory,
        path: str,
        *,
        read_only: bool = False,
        writeback: bool = False,
        engine: str = "Sync",
        limiter: Limits | None = None,
        backing: Backing | None = None,
    ) -> None: ...
    def update(self, path: str, backing: Backing | None = None) -> None: ...
