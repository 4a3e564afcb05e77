SECTOR: int

class Backing:
    discards: bool
    fd: int
    file: tuple[int, int]
    granularity: int
    identity: bytes
    lockable: bool
    locking: bool
    path: str
    read_only: bool
    size: int
    def duplicate(self) -> Backing: ...
    def lock(self) -> bool: ...
    def unlock(self) -> None: ...
    def close(self) -> None: ...

def open_backing(path: str, read_only: bool) -> Backing: ...
