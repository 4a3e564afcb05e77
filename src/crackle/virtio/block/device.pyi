from crackle.memory.guest import GuestMemory
from crackle.schema.rate_limiter import RateLimiter as Limits
from crackle.virtio.block.backing import Backing
from crackle.virtio.block.queue import BlockQueue

class Block(BlockQueue):
    @property
    def path(self) -> str: ...
    @property
    def size(self) -> int: ...
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
