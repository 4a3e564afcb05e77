"""What all tests share: the modules of `support`, where they run, and how hard hypothesis tries.

Profiles, chosen by CRACKLE_HYPOTHESIS: "test" (the default) tries the same examples every time, so that a
run says something about the change and not about luck; "fuzz" tries CRACKLE_EXAMPLES new ones (`make fuzz`).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

from support.elsewhere import Beside, report_where_told, runs_elsewhere
from support.network import Namespace, may_make_namespaces

# Ignored under nohup, or behind a script's "&", and what is ignored stays so in what the tests start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

_COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("test", derandomize=True, database=None, max_examples=100, **_COMMON)
settings.register_profile(
    "fuzz", max_examples=int(os.environ.get("CRACKLE_EXAMPLES", "2000")), print_blob=True, **_COMMON
)
settings.load_profile(os.environ.get("CRACKLE_HYPOTHESIS", "test"))


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    """Tests that need no quiet beside those that do; alone, or where their output is wanted, as all others."""
    options = session.config.option
    items = [item for item in session.items if item.get_closest_marker("beside")]
    alone = len(items) == len(session.items) or options.capture == "no" or options.usepdb
    if not items or alone or runs_elsewhere(session.config):
        return (yield)
    # Their results are waited for as late as may be.
    session.items.sort(key=lambda item: item in items)
    with Beside(session.config, items) as beside:
        session.config.pluginmanager.register(beside)
        return (yield)


def pytest_configure(config: pytest.Config) -> None:
    report_where_told(config)


@pytest.fixture
def namespaces() -> Iterator[Callable[[], Namespace]]:
    """Makes network namespaces that end with the test."""
    if not may_make_namespaces():
        pytest.skip("may not make network namespaces")
    with ExitStack() as stack:
        yield lambda: stack.enter_context(Namespace())


@pytest.fixture
def namespace(namespaces: Callable[[], Namespace]) -> Namespace:
    """A network namespace that ends with the test."""
    return namespaces()
