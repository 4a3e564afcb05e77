class Backing:
    __slots__ = ("discards", "fd", "granularity", "identity", "size")
    fd: int
    size: int
    identity: bytes
    discards: bool
    granularity: int

def open_backing(path: str, read_only: bool) -> Backing: ...

SECTOR: int
