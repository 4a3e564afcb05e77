"""The keyboard controller: reset, Ctrl-Alt-Del, and what Linux's probe expects of it."""

from __future__ import annotations

import os

import pytest

from crackle.devices.i8042 import I8042
from crackle.kvm.bus import CONTINUE, RESET, Bus

DATA, COMMAND = 0x60, 0x64
OUTPUT_FULL, SYSTEM_FLAG = 0x01, 0x04


class Keyboard:
    """The controller on a bus, with a guest's hands on its ports and an eye on its interrupt."""

    def __init__(self) -> None:
        self.irq = os.eventfd(0, os.EFD_NONBLOCK)
        self.device = I8042(self.irq)
        self.bus = Bus("pio")
        self.bus.attach_python(0x60, 5, self.device)

    def command(self, *values: int) -> None:
        self.bus.write(COMMAND, 1, values[0])
        for value in values[1:]:
            self.bus.write(DATA, 1, value)

    def answers(self) -> list[int]:
        """Everything in the output buffer, read as its driver does."""
        found = []
        while self.bus.read(COMMAND, 1) & OUTPUT_FULL:
            found.append(self.bus.read(DATA, 1))
        return found

    def interrupts(self) -> int:
        try:
            return os.eventfd_read(self.irq)
        except BlockingIOError:
            return 0


@pytest.fixture
def keyboard():
    keyboard = Keyboard()
    yield keyboard
    os.close(keyboard.irq)


def test_the_reset_command_resets_the_machine(keyboard: Keyboard) -> None:
    assert keyboard.bus.write(COMMAND, 1, 0xFE) == RESET
    assert keyboard.device.reset_count == 1


def test_a_fresh_controller_is_ready_and_has_nothing_to_say(keyboard: Keyboard) -> None:
    assert keyboard.bus.read(COMMAND, 1) & (OUTPUT_FULL | SYSTEM_FLAG) == SYSTEM_FLAG
    assert keyboard.bus.read(DATA, 1) == 0
    assert keyboard.interrupts() == 0


def test_the_self_tests_pass(keyboard: Keyboard) -> None:
    keyboard.command(0xAA)
    assert keyboard.answers() == [0x55]
    keyboard.command(0xAB)
    assert keyboard.answers() == [0x00]


def test_the_control_byte_reads_back(keyboard: Keyboard) -> None:
    keyboard.command(0x60, 0x61)
    keyboard.command(0x20)
    assert keyboard.answers() == [0x61]
    keyboard.command(0xAD)
    keyboard.command(0x20)
    assert keyboard.answers() == [0x71]
    keyboard.command(0xAE)
    keyboard.command(0x20)
    assert keyboard.answers() == [0x61]


def test_the_output_port_reads_back(keyboard: Keyboard) -> None:
    keyboard.command(0xD1, 0xDF)
    keyboard.command(0xD0)
    assert keyboard.answers() == [0xDF]


def test_bytes_written_to_the_keyboard_buffer_come_out_as_typed(keyboard: Keyboard) -> None:
    keyboard.command(0xD2, 0x1C)
    keyboard.command(0xD2, 0x9C)
    assert keyboard.answers() == [0x1C, 0x9C]


@pytest.mark.parametrize(
    ("command", "answer"),
    [(0xFF, [0xFA, 0xAA]), (0xF2, [0xFA, 0xAB, 0x83]), (0xEE, [0xEE]), (0xED, [0xFA]), (0xF4, [0xFA])],
)
def test_the_keyboard_answers_its_commands(keyboard: Keyboard, command: int, answer: list[int]) -> None:
    keyboard.bus.write(DATA, 1, command)
    assert keyboard.answers() == answer


@pytest.mark.parametrize(
    ("control", "codes"), [(0x05, [0x14, 0x11, 0xE0, 0x71]), (0x45, [0x1D, 0x38, 0xE0, 0x53])]
)
def test_ctrl_alt_del_is_typed_in_the_scan_code_set_in_force(
    keyboard: Keyboard, control: int, codes: list[int]
) -> None:
    keyboard.command(0x60, control)
    keyboard.device.send_ctrl_alt_del()
    assert keyboard.interrupts() == 1
    typed = []
    for left in range(len(codes), 0, -1):
        typed.append(keyboard.bus.read(DATA, 1))
        # Each byte that waits announces itself.
        assert keyboard.interrupts() == (1 if left > 1 else 0)
    assert typed == codes
    assert not keyboard.bus.read(COMMAND, 1) & OUTPUT_FULL


def test_no_interrupt_comes_while_the_guest_has_them_off(keyboard: Keyboard) -> None:
    keyboard.command(0x60, 0x04)
    keyboard.device.send_ctrl_alt_del()
    assert keyboard.interrupts() == 0
    assert keyboard.bus.read(COMMAND, 1) & OUTPUT_FULL


def test_keys_that_find_no_room_are_counted_and_dropped(keyboard: Keyboard) -> None:
    for _ in range(5):
        keyboard.device.send_ctrl_alt_del()
    assert keyboard.device.missed_write_count == 4
    assert len(keyboard.answers()) == 16


@pytest.mark.parametrize(("port", "size"), [(0x61, 1), (0x60, 2), (0x60, 4), (0x63, 1)])
def test_other_ports_and_widths_do_nothing_and_are_counted(keyboard: Keyboard, port: int, size: int) -> None:
    keyboard.device.send_ctrl_alt_del()
    assert keyboard.bus.read(port, size) == 0
    assert keyboard.bus.write(port, size, 0xFE) == CONTINUE
    assert (keyboard.device.missed_read_count, keyboard.device.missed_write_count) == (1, 1)
    assert len(keyboard.answers()) == 4


@pytest.mark.parametrize("command", [0x00, 0xA7, 0xD4, 0xFF])
def test_an_unknown_command_is_an_error_and_nothing_more(keyboard: Keyboard, command: int) -> None:
    assert keyboard.bus.write(COMMAND, 1, command) == CONTINUE
    assert keyboard.device.error_count == 1
    assert keyboard.answers() == []


def test_the_saved_state_restores_to_the_same_controller(keyboard: Keyboard) -> None:
    keyboard.command(0x60, 0x45)
    keyboard.command(0xD1, 0x03)
    keyboard.device.send_ctrl_alt_del()
    keyboard.bus.write(COMMAND, 1, 0xD2)  # its parameter is still to come
    state = keyboard.device.save()

    other = Keyboard()
    other.device.restore(state)
    assert other.device.save() == state
    other.bus.write(DATA, 1, 0x77)
    assert other.answers() == [0x1D, 0x38, 0xE0, 0x53, 0x77]
    other.command(0x20)
    assert other.answers() == [0x45]
    other.command(0xD0)
    assert other.answers() == [0x03]
    os.close(other.irq)
