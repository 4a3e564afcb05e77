"""`crackle cni`: a CNI plugin that gives a microVM the interface that the plugin before it has made.

Chained after any plugin that makes an interface in the network namespace: a TAP device takes that interface's place
(`redirect`), and the result has what a client needs: the TAP device, and behind it an interface of the same name whose
sandbox is the microVM, with the MAC and IP addresses that the guest is to have. That is what tc-redirect-tap does for
Firecracker's Go SDK, which reads it so. The CNI specification, version 1.0.0: https://www.cni.dev/docs/spec/.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from crackle.errors import ConfigError, CrackleError, os_reason
from crackle.hostnet.redirect import Redirects
from crackle.runtime.system import CLONE_NEWNET, join_namespace

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crackle.hostnet.redirect import Interface

# Before 0.3 there are no interfaces in a result.
VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0")
# Error codes (section 5, "Error").
_INCOMPATIBLE, _BAD_ENVIRONMENT, _UNREADABLE, _UNDECODABLE, _BAD_CONFIG, _REFUSED = 1, 4, 5, 6, 7, 100
_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")
_INTERFACE = re.compile(r"[^\s/:]{1,15}")


class CniError(CrackleError):
    """What the runtime is told. code: of the specification's, 100 for what the kernel refused."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Call(NamedTuple):
    """What a runtime asks for. tap: the TAP device's name, None for a free one. uid, gid: who may open it."""

    version: str
    container: str
    interface: str
    netns: str
    tap: str | None
    uid: int
    gid: int
    previous: dict[str, Any] | None

    @property
    def mark(self) -> str:
        """What is written on the TAP device, so that it is found again."""
        return f"crackle cni {self.container} {self.interface}"


def main() -> NoReturn:
    """The console script `crackle-cni`: one call, and the exit status."""
    sys.exit(run(os.environ, sys.stdin.buffer.read()))


def run(environment: Mapping[str, str], text: bytes) -> int:
    """Carry out the call in the environment, `text` being its configuration; 0, or 1 with the error as a result."""
    version = VERSIONS[-1]
    try:
        command = environment.get("CNI_COMMAND", "")
        if command == "VERSION":
            _print({"cniVersion": version, "supportedVersions": VERSIONS})
            return 0
        config = _decoded(text)
        version = _version(config)
        call = _call(environment, config, version, command)
        if command == "ADD":
            _print(_add(call))
        elif command == "CHECK":
            _check(call)
        else:
            _delete(call)
    except CrackleError as error:
        code = error.code if isinstance(error, CniError) else _REFUSED
        _print({"cniVersion": version, "code": code, "msg": str(error)})
        return 1
    return 0


def _print(result: object) -> None:
    print(json.dumps(result, indent=2))


# -- what is asked for -------------------------------------------------------------------------------------------------


def _decoded(text: bytes) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise CniError(_UNDECODABLE, f"the network configuration is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise CniError(_UNDECODABLE, "the network configuration is no JSON object")
    return config


def _version(config: dict[str, Any]) -> str:
    version = config.get("cniVersion", "0.1.0")
    if version not in VERSIONS:
        supported = ", ".join(VERSIONS)
        raise CniError(_INCOMPATIBLE, f"CNI {version} is not supported; supported are {supported}")
    return str(version)


def _call(environment: Mapping[str, str], config: dict[str, Any], version: str, command: str) -> Call:
    if command not in ("ADD", "CHECK", "DEL"):
        raise CniError(
            _BAD_ENVIRONMENT, f"CNI_COMMAND is {command!r}, which is none of ADD, CHECK, DEL, VERSION"
        )
    values = {}
    for name, form in (("CNI_CONTAINERID", _ID), ("CNI_IFNAME", _INTERFACE)):
        values[name] = environment.get(name, "")
        if not form.fullmatch(values[name]):
            raise CniError(_BAD_ENVIRONMENT, f"{name} is {values[name]!r}, which is no name")
    netns = environment.get("CNI_NETNS", "")
    if not netns and command != "DEL":
        raise CniError(_BAD_ENVIRONMENT, "CNI_NETNS is not set")
    arguments = dict(_arguments(environment.get("CNI_ARGS", "")))
    tap = arguments.get("TC_REDIRECT_TAP_NAME")
    if tap is not None and not _INTERFACE.fullmatch(tap):
        raise CniError(_BAD_ENVIRONMENT, f"TC_REDIRECT_TAP_NAME is {tap!r}, which is no name of an interface")
    previous = config.get("prevResult")
    if previous is not None and not isinstance(previous, dict):
        raise CniError(_BAD_CONFIG, "prevResult is no JSON object")
    if previous is None and command != "DEL":
        raise CniError(_BAD_CONFIG, "there is no prevResult: another plugin has to make the interface first")
    return Call(
        version,
        values["CNI_CONTAINERID"],
        values["CNI_IFNAME"],
        netns,
        tap,
        _user(arguments, config, "uid", os.geteuid()),
        _user(arguments, config, "gid", os.getegid()),
        previous,
    )


def _arguments(text: str) -> list[tuple[str, str]]:
    pairs = []
    for part in filter(None, text.split(";")):
        name, equals, value = part.partition("=")
        if not equals:
            raise CniError(_BAD_ENVIRONMENT, f"CNI_ARGS has {part!r}, which is no NAME=VALUE")
        pairs.append((name, value))
    return pairs


def _user(arguments: dict[str, str], config: dict[str, Any], what: str, default: int) -> int:
    """Of the runtime's arguments, else of the configuration, else whoever runs this."""
    given = arguments.get(f"TC_REDIRECT_TAP_{what.upper()}", config.get(what, default))
    text = str(given)
    if not (text.isascii() and text.isdecimal()) or int(text) >= (1 << 32) - 1:
        raise CniError(_BAD_CONFIG, f"{what} is {given!r}, which is no number of a {what}")
    return int(text)


# -- doing it ----------------------------------------------------------------------------------------------------------


def _enter(netns: str) -> None:
    """Be in that network namespace, for good: a plugin's process is for one call."""
    try:
        fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CniError(_BAD_ENVIRONMENT, f"CNI_NETNS cannot be opened: {os_reason(error)}: {netns}") from None
    try:
        join_namespace(fd, CLONE_NEWNET)
    except OSError as error:
        raise CniError(
            _BAD_ENVIRONMENT, f"CNI_NETNS is no network namespace to join: {os_reason(error)}: {netns}"
        ) from None
    finally:
        os.close(fd)


def _add(call: Call) -> dict[str, Any]:
    assert call.previous is not None
    interfaces = _interfaces(call.previous)
    place = _own(call, interfaces)
    _enter(call.netns)
    with Redirects() as redirects:
        replaced = _found(redirects, call.interface)
        if redirects.marked(call.mark):
            raise ConfigError(f"{call.interface} of {call.container} has a TAP device already")
        tap = redirects.add(replaced, call.tap, call.mark, call.uid, call.gid)
    guest = len(interfaces) + 1
    behind = [
        {"name": tap.name, "mac": tap.mac, "sandbox": call.netns},
        {"name": tap.name, "mac": replaced.mac, "sandbox": call.container},
    ]
    addresses = call.previous.get("ips") or []
    moved = [
        {**address, "interface": guest} for address in addresses if address.get("interface", place) == place
    ]
    return {
        **call.previous,
        "cniVersion": call.version,
        "interfaces": [*interfaces, *behind],
        "ips": [*addresses, *moved],
    }


def _check(call: Call) -> None:
    assert call.previous is not None
    tap_name = _tap_of(call, _interfaces(call.previous))
    _enter(call.netns)
    with Redirects() as redirects:
        replaced = _found(redirects, call.interface)
        taps = [tap for tap in redirects.marked(call.mark) if tap.name == tap_name]
        if not taps:
            raise ConfigError(f"the TAP device {tap_name} of {call.container} is not there")
        (tap,) = taps
        if not (redirects.leads_to(replaced, tap) and redirects.leads_to(tap, replaced)):
            raise ConfigError(
                f"{tap.name} is not in the place of {replaced.name}: nothing leads from one to the other"
            )
        if tap.mtu != replaced.mtu:
            raise ConfigError(
                f"the MTU of {tap.name} is {tap.mtu}, and that of {replaced.name} {replaced.mtu}"
            )


def _delete(call: Call) -> None:
    """What is gone already, the namespace too, is no fault (section 2, "DEL")."""
    if not os.path.exists(call.netns):
        return
    _enter(call.netns)
    with Redirects() as redirects:
        replaced = redirects.find(call.interface)
        for tap in redirects.marked(call.mark):
            redirects.remove(replaced, tap.name)


def _found(redirects: Redirects, name: str) -> Interface:
    found = redirects.find(name)
    if found is None:
        raise ConfigError(f"there is no interface {name} in the network namespace")
    return found


# -- results -----------------------------------------------------------------------------------------------------------


def _interfaces(previous: dict[str, Any]) -> list[dict[str, Any]]:
    interfaces = previous.get("interfaces") or []
    if not isinstance(interfaces, list) or not all(isinstance(each, dict) for each in interfaces):
        raise CniError(_BAD_CONFIG, "the interfaces of prevResult are no list of JSON objects")
    return interfaces


def _own(call: Call, interfaces: list[dict[str, Any]]) -> int:
    """Which of them is the one whose place the TAP device takes."""
    for place, each in enumerate(interfaces):
        if each.get("name") == call.interface and each.get("sandbox") == call.netns:
            return place
    raise CniError(_BAD_CONFIG, f"prevResult has no interface {call.interface} in {call.netns}")


def _tap_of(call: Call, interfaces: list[dict[str, Any]]) -> str:
    for each in interfaces:
        if each.get("sandbox") == call.container:
            return str(each.get("name"))
    raise CniError(_BAD_CONFIG, f"prevResult has no interface of the microVM {call.container}")


if __name__ == "__main__":
    main()
