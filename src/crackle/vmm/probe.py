"""Whether Linux guests run on this host's KVM: a verdict on what the platform's probe has found.

Whoever sees a guest fail, or do nothing at all, asks `why_no_linux`.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

import msgspec

from crackle.errors import CrackleError

if TYPE_CHECKING:
    from crackle.arch import Finding


class Verdict(msgspec.Struct, frozen=True):
    """Whether Linux guests run on this KVM: a sentence with why not and what to do, and what it rests on."""

    linux: bool
    sentence: str
    findings: list[Finding]


def probe(path: str = "/dev/kvm") -> Verdict:
    """Ask the KVM at `path`. Takes tens of milliseconds, a few seconds where guests hang.

    Raises nothing of ours: a KVM that cannot be used is a verdict too.
    """
    try:
        from crackle.arch import platform
        from crackle.kvm import Kvm

        with Kvm(path) as kvm:
            findings = platform.probe(kvm)
    except CrackleError as error:
        return Verdict(False, f"no: {error}", [])
    broken = [finding for finding in findings if not finding.works]
    if not broken:
        return Verdict(True, "yes: Linux guests will run here", findings)
    why = next((finding for finding in broken if finding.name == "system calls"), broken[0])
    return Verdict(False, f"no: {why.detail}; use tools/emuhost", findings)


@functools.cache
def why_no_linux(path: str = "/dev/kvm") -> str | None:
    """A sentence for who waits for a Linux guest that this host's KVM cannot run; None where it can, or nobody knows.

    Costs nothing on a host with hardware virtualisation, elsewhere what `probe` does, once.
    """
    if any(os.path.isdir(f"/sys/module/{module}") for module in ("kvm_intel", "kvm_amd")):
        return None
    verdict = probe(path)
    if verdict.linux or not verdict.findings:
        return None
    reason = verdict.sentence.removeprefix("no: ").partition(";")[0]
    advice = "`crackle doctor` tells more; tools/emuhost is a host that does."
    return f"This host's KVM does not run Linux guests: {reason}. {advice}"
