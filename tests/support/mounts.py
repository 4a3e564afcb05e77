"""Programs that see other files than the tests do."""

from __future__ import annotations

import subprocess

import pytest


def with_mounts(script: str) -> list[str]:
    """The beginning of a command line: what follows runs in a mount namespace of its own, after the shell's `script`.

    Skips the test where there can be none: without root, or where / is a mere directory, as in a chroot.
    """
    if subprocess.run(["unshare", "--mount", "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("may not make mount namespaces")
    return ["unshare", "--mount", "sh", "-c", f'{script}\nexec "$@"', "sh"]
