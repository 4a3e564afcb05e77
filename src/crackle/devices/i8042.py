"""The i8042 keyboard controller with an AT keyboard: machine reset and Ctrl-Alt-Del, nothing more is ever typed.

Ports 0x60 (data) and 0x64 (status, command); IBM PC/AT Technical Reference, "Keyboard Controller". A cold device: it is
written in Python and called under the GIL. Owns nothing; the interrupt eventfd belongs to the machine.
"""

from __future__ import annotations

import os
from _thread import allocate_lock

from crackle.devices.state import I8042State
from crackle.kvm.bus import CONTINUE, RESET

# Ports, from the first on.
_DATA, COMMAND = 0, 4

# Status register
_OUTPUT_FULL = 0x01
_SYSTEM_FLAG = 0x04
_LAST_WAS_COMMAND = 0x08
_KEYBOARD_UNLOCKED = 0x10

# Control byte
_KEYBOARD_INTERRUPT = 0x01
_POST_OK = 0x04
_KEYBOARD_DISABLED = 0x10
_TRANSLATE = 0x40

# Controller commands
_READ_CONTROL = 0x20
_WRITE_CONTROL = 0x60
_TEST_CONTROLLER = 0xAA
_TEST_KEYBOARD_PORT = 0xAB
_DISABLE_KEYBOARD = 0xAD
_ENABLE_KEYBOARD = 0xAE
_READ_OUTPUT = 0xD0
_WRITE_OUTPUT = 0xD1
_WRITE_KEYBOARD_BUFFER = 0xD2
PULSE_RESET = 0xFE

# Keyboard: answers, and how many parameter bytes a command takes
_ACK = 0xFA
_ANSWERS = {
    0xEE: b"\xee",  # echo
    0xF2: b"\xfa\xab\x83",  # identify: MF2 keyboard
    0xFF: b"\xfa\xaa",  # reset: self-test passed
}

# Left Ctrl, left Alt and Delete pressed, in scan code set 2 and as the controller translates it to set 1.
_CTRL_ALT_DEL = b"\x14\x11\xe0\x71"
_CTRL_ALT_DEL_TRANSLATED = b"\x1d\x38\xe0\x53"

_BUFFER = 16


class I8042:
    """The controller. irq_fd: an eventfd bound to GSI 1, or -1."""

    def __init__(self, irq_fd: int = -1) -> None:
        self._irq_fd = irq_fd
        self._lock = allocate_lock()
        self._control = _POST_OK | _KEYBOARD_INTERRUPT
        self._output_port = 0
        self._command = 0  # the controller command that waits for its parameter
        self._pending = bytearray()
        self.error_count = 0
        self.read_count = 0
        self.write_count = 0
        self.reset_count = 0
        self.missed_read_count = 0
        self.missed_write_count = 0

    def send_ctrl_alt_del(self) -> None:
        """Press Ctrl-Alt-Del. The guest decides what that means; Linux reboots when its init agrees."""
        with self._lock:
            self._push(_CTRL_ALT_DEL_TRANSLATED if self._control & _TRANSLATE else _CTRL_ALT_DEL)

    def _push(self, data: bytes) -> None:
        was_empty = not self._pending
        if len(self._pending) + len(data) > _BUFFER:
            self.missed_write_count += len(data)
            return
        self._pending += data
        if was_empty:
            self._interrupt()

    def _interrupt(self) -> None:
        if self._pending and self._control & _KEYBOARD_INTERRUPT and self._irq_fd >= 0:
            os.eventfd_write(self._irq_fd, 1)

    # -- the bus's side, called on a vCPU thread ---------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """A read of port 0x60 + offset."""
        with self._lock:
            if size != 1 or offset not in (_DATA, COMMAND):
                self.missed_read_count += 1
                return 0
            self.read_count += 1
            if offset == COMMAND:
                return _SYSTEM_FLAG | _KEYBOARD_UNLOCKED | (_OUTPUT_FULL if self._pending else 0)
            if not self._pending:
                return 0
            value = self._pending.pop(0)
            self._interrupt()
            return value

    def write(self, offset: int, size: int, value: int) -> int:
        """A write of port 0x60 + offset. Returns what the vCPU is to do: go on, or reset the machine."""
        with self._lock:
            if size != 1 or offset not in (_DATA, COMMAND):
                self.missed_write_count += 1
                return CONTINUE
            self.write_count += 1
            if offset == COMMAND:
                return self._controller(value)
            command, self._command = self._command, 0
            if command == _WRITE_CONTROL:
                self._control = value
            elif command == _WRITE_OUTPUT:
                self._output_port = value
            elif command == _WRITE_KEYBOARD_BUFFER:
                self._push(bytes((value,)))
            else:
                # A keyboard command or its parameter: every one is acknowledged, a few say more.
                self._control &= ~_KEYBOARD_DISABLED
                self._pending.clear()
                self._push(_ANSWERS.get(value, bytes((_ACK,))))
            return CONTINUE

    def _controller(self, command: int) -> int:
        if command == PULSE_RESET:
            self.reset_count += 1
            return RESET
        if command in (_WRITE_CONTROL, _WRITE_OUTPUT, _WRITE_KEYBOARD_BUFFER):
            self._command = command
        elif command == _READ_CONTROL:
            self._answer(self._control)
        elif command == _READ_OUTPUT:
            self._answer(self._output_port)
        elif command == _TEST_CONTROLLER:
            self._answer(0x55)
        elif command == _TEST_KEYBOARD_PORT:
            self._answer(0x00)
        elif command == _DISABLE_KEYBOARD:
            self._control |= _KEYBOARD_DISABLED
        elif command == _ENABLE_KEYBOARD:
            self._control &= ~_KEYBOARD_DISABLED
        else:
            self.error_count += 1
        return CONTINUE

    def _answer(self, value: int) -> None:
        self._pending.clear()
        self._push(bytes((value,)))

    # -- saved state ---------------------------------------------------------------------------------------------

    def save(self) -> I8042State:
        """The registers; the machine is paused."""
        return I8042State(
            control=self._control,
            output_port=self._output_port,
            command=self._command,
            pending=bytes(self._pending),
        )

    def restore(self, state: I8042State) -> None:
        """The reverse of `save`, before the vCPUs run."""
        self._control, self._output_port = state.control, state.output_port
        self._command, self._pending = state.command, bytearray(state.pending)
