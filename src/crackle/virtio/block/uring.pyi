from crackle.memory.guest import GuestMemory
from crackle.virtio.block.engine import Engine

class AsyncEngine(Engine):
    def __init__(self, memory: GuestMemory) -> None: ...

def check_host() -> None: ...
