"""Ethernet, ARP (RFC 826), IPv4 (RFC 791) and TCP (RFC 9293) as bytes: what a guest's frame says, and frames for it.

A message on a wire is a struct virtio_net_hdr_v1 (virtio 1.2, 5.1.6) and an Ethernet frame. Everything in it is
hostile: every length is checked against what is there.
"""

from __future__ import annotations

import struct

import msgspec

# The metadata service's own address on the link.
MAC = bytes.fromhex("060123456701")

VNET_HEADER_SIZE = 12
# The largest message: an IPv4 packet made by segmentation offload, with the headers before it.
MAX_MESSAGE_SIZE = VNET_HEADER_SIZE + 14 + 0xFFFF

FIN = 0x01
SYN = 0x02
RST = 0x04
PSH = 0x08
ACK = 0x10

# What a peer that names no segment size takes (RFC 9293, 3.7.1), and the least and the most that is believed.
DEFAULT_MSS = 536
MIN_MSS = 64
# What is left of the largest IPv4 packet without its headers: a peer may ask for more.
MAX_MSS = 0xFFFF - 20 - 20

_NEEDS_CSUM = 1  # VIRTIO_NET_HDR_F_NEEDS_CSUM: the checksum is for the receiver to finish
_DATA_VALID = 2  # VIRTIO_NET_HDR_F_DATA_VALID: it has been checked

_ETHERTYPE_IPV4 = 0x0800
_ETHERTYPE_ARP = 0x0806
_PROTOCOL_TCP = 6

_ETHERNET = struct.Struct("!6s6sH")
# Hardware and protocol type and sizes, operation, sender's and target's addresses.
_ARP = struct.Struct("!HHBBH6s4s6s4s")
_ARP_KIND = (1, _ETHERTYPE_IPV4, 6, 4)
_ARP_REQUEST = 1
_ARP_REPLY = 2
# Version and header size, service, size, id, flags and fragment, time to live, protocol, checksum, source, destination.
_IPV4 = struct.Struct("!BBHHHBBH4s4s")
# Ports, sequence, acknowledgement, data offset and flags, window, checksum, urgent pointer.
_TCP = struct.Struct("!HHIIHHHH")

_FRAGMENT = 0x3FFF  # more fragments, or an offset
_DONT_FRAGMENT = 0x4000
# One hop, as Firecracker: metadata is for the guest, not for what the guest forwards for.
_TTL = 1

_OPTION_END = 0
_OPTION_NOP = 1
_OPTION_MSS = 2


class FrameError(Exception):
    """A frame that is passed over. `counter` names the metric that tells of it."""

    def __init__(self, counter: str) -> None:
        super().__init__(counter)
        self.counter = counter


class ArpRequest(msgspec.Struct, frozen=True):
    """Somebody asks which MAC address has ours."""

    mac: bytes
    address: bytes


class Peer(msgspec.Struct, frozen=True):
    """The other end of a connection."""

    mac: bytes
    address: bytes
    port: int


class Segment(msgspec.Struct, frozen=True):
    """A TCP segment that has been checked. `mss` is its option of that name, or DEFAULT_MSS."""

    peer: Peer
    port: int
    seq: int
    ack: int
    flags: int
    window: int
    mss: int
    payload: bytes

    @property
    def length(self) -> int:
        """What it takes of the sequence numbers."""
        return len(self.payload) + bool(self.flags & SYN) + bool(self.flags & FIN)


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071): the complement of the sum of 16-bit words, which is a remainder by 2^16 - 1."""
    return -int.from_bytes(data + bytes(len(data) % 2), "big") % 0xFFFF


def parse(message: bytes, address: bytes) -> ArpRequest | Segment:
    """What the guest sent to the IPv4 address `address`; FrameError for all that the service does not answer."""
    frame = memoryview(message)[VNET_HEADER_SIZE:]
    if len(frame) < _ETHERNET.size:
        raise FrameError("rx_bad_eth")
    _, source, ethertype = _ETHERNET.unpack_from(frame)
    packet = frame[_ETHERNET.size :]
    if ethertype == _ETHERTYPE_IPV4:
        return _parse_ipv4(packet, address, source, message[0] & (_NEEDS_CSUM | _DATA_VALID) == 0)
    if ethertype == _ETHERTYPE_ARP:
        return _parse_arp(packet, address)
    raise FrameError("rx_bad_eth")


def _parse_arp(packet: memoryview, address: bytes) -> ArpRequest:
    if len(packet) < _ARP.size:
        raise FrameError("rx_accepted_err")
    *kind, operation, mac, sender, _, target = _ARP.unpack_from(packet)
    if tuple(kind) != _ARP_KIND or operation != _ARP_REQUEST or target != address:
        raise FrameError("rx_accepted_unusual")
    return ArpRequest(mac, sender)


def _parse_ipv4(packet: memoryview, address: bytes, mac: bytes, verify: bool) -> Segment:
    if len(packet) < _IPV4.size:
        raise FrameError("rx_accepted_err")
    version, _, size, _, fragment, _, protocol, _, source, destination = _IPV4.unpack_from(packet)
    header = (version & 15) * 4
    # What follows the packet is padding.
    if version >> 4 != 4 or not _IPV4.size <= header <= size <= len(packet):
        raise FrameError("rx_accepted_err")
    if checksum(bytes(packet[:header])):
        raise FrameError("rx_accepted_err")
    if protocol != _PROTOCOL_TCP or destination != address or fragment & _FRAGMENT:
        raise FrameError("rx_accepted_unusual")
    return _parse_tcp(packet[header:size], source, destination, mac, verify)


def _parse_tcp(segment: memoryview, source: bytes, destination: bytes, mac: bytes, verify: bool) -> Segment:
    if len(segment) < _TCP.size:
        raise FrameError("rx_accepted_err")
    from_port, port, seq, ack, offset_flags, window, _, _ = _TCP.unpack_from(segment)
    header = (offset_flags >> 12) * 4
    if not _TCP.size <= header <= len(segment):
        raise FrameError("rx_accepted_err")
    if verify and checksum(_pseudo_header(source, destination, len(segment)) + segment):
        raise FrameError("rx_accepted_err")
    mss = _mss(bytes(segment[_TCP.size : header]))
    payload = bytes(segment[header:])
    return Segment(Peer(mac, source, from_port), port, seq, ack, offset_flags & 0x1FF, window, mss, payload)


def _mss(options: bytes) -> int:
    """The maximum segment size among TCP options; options that make no sense end the search."""
    at = 0
    while at < len(options) and options[at] != _OPTION_END:
        if options[at] == _OPTION_NOP:
            at += 1
            continue
        size = options[at + 1] if at + 1 < len(options) else 0
        if size < 2 or at + size > len(options):
            break
        if options[at] == _OPTION_MSS and size == 4:
            return min(max(MIN_MSS, int.from_bytes(options[at + 2 : at + 4], "big")), MAX_MSS)
        at += size
    return DEFAULT_MSS


def _pseudo_header(source: bytes, destination: bytes, size: int) -> bytes:
    return source + destination + struct.pack("!HH", _PROTOCOL_TCP, size)


def arp_reply(request: ArpRequest, address: bytes) -> bytes:
    """The message that answers `request`: `address` is ours."""
    body = _ARP.pack(*_ARP_KIND, _ARP_REPLY, MAC, address, request.mac, request.address)
    return bytes(VNET_HEADER_SIZE) + _ETHERNET.pack(request.mac, MAC, _ETHERTYPE_ARP) + body


def segment(
    address: bytes,
    port: int,
    peer: Peer,
    *,
    seq: int,
    ack: int,
    flags: int,
    window: int,
    mss: int | None = None,
    payload: bytes = b"",
) -> bytes:
    """The message that carries a TCP segment from `address` and `port` to `peer`, every checksum in place."""
    options = b"" if mss is None else struct.pack("!BBH", _OPTION_MSS, 4, mss)
    header = _TCP.size + len(options)
    size = header + len(payload)

    def tcp(check: int) -> bytes:
        return _TCP.pack(port, peer.port, seq, ack, header << 10 | flags, window, check, 0)

    check = checksum(_pseudo_header(address, peer.address, size) + tcp(0) + options + payload)
    total = _IPV4.size + size

    def ipv4(check: int) -> bytes:
        return _IPV4.pack(
            0x45, 0, total, 0, _DONT_FRAGMENT, _TTL, _PROTOCOL_TCP, check, address, peer.address
        )

    return b"".join(
        (
            bytes(VNET_HEADER_SIZE),
            _ETHERNET.pack(peer.mac, MAC, _ETHERTYPE_IPV4),
            ipv4(checksum(ipv4(0))),
            tcp(check),
            options,
            payload,
        )
    )
