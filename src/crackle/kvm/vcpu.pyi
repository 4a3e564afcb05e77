from typing import Literal, TypeAlias

from crackle.kvm.bus import Bus
from crackle.runtime.threads import Worker

END_NAMES: dict[int, str]

_Access: TypeAlias = tuple[int, bool, int, bytes]

class VcpuBase(Worker):
    @property
    def fd(self) -> int: ...
    @property
    def index(self) -> int: ...
    @property
    def profile(self) -> bool: ...
    @property
    def exits(self) -> dict[str, int]: ...
    @property
    def failure(self) -> str | None: ...
    def close(self) -> None: ...
    def start(
        self,
        pio: Bus,
        mmio: Bus,
        exit_fd: int = -1,
        paused: bool = False,
        profile: bool = False,
        kind: str = "vcpu",
    ) -> None: ...
    def run_once(
        self,
    ) -> (
        tuple[Literal["interrupted"], None]
        | tuple[Literal["io", "mmio"], _Access]
        | tuple[Literal["exit"], int]
    ): ...
    def answer(self, data: bytes) -> None: ...
    def kick(self) -> None: ...
    def time_exits(self, count: int) -> int: ...
