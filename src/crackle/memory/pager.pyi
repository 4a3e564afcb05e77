from collections.abc import Sequence

WINDOW: int

class Pager:
    @property
    def faults(self) -> int: ...
    @property
    def asked(self) -> list[int]: ...
    def __init__(
        self,
        fault: int,
        peer: int,
        memory_fd: int,
        ranges: Sequence[tuple[int, int, int]],
        page_size: int,
        wanted: Sequence[int] = (),
    ) -> None: ...
    def begin(self) -> None: ...
    def end(self) -> None: ...
    def run(self, seconds: float = -1.0) -> bool: ...
