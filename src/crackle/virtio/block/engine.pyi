from typing import Self

from crackle.memory.guest import GuestMemory

class Engine:
    @property
    def event_fd(self) -> int: ...
    def __new__(cls, memory: GuestMemory) -> Self: ...
