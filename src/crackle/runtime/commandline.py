"""Command lines as Firecracker's programs have them: `--name value` and `--switch`, each once, or as often as it may.

Parsed by hand because a parser library costs 8 ms.
"""

from __future__ import annotations

from crackle.errors import CrackleError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence


class UsageError(CrackleError):
    """A command line that means nothing."""


def pairs(
    arguments: Sequence[str],
    known: Collection[str],
    switches: Collection[str],
    repeatable: Collection[str] = (),
) -> Iterator[tuple[str, str]]:
    """The options given, in their order, a switch with the value ``""``; raises UsageError.

    known: all names, without ``--``; those of `switches` take no value, those of `repeatable` may come again.
    """
    seen = set()
    rest = iter(arguments)
    for argument in rest:
        name = argument.removeprefix("--")
        if name == argument or name not in known:
            raise UsageError(
                f"Found argument '{name}' which wasn't expected, or isn't valid in this context."
            )
        if name in seen and name not in repeatable:
            raise UsageError(f"The argument '{name}' was provided more than once.")
        seen.add(name)
        if name in switches:
            yield name, ""
            continue
        value = next(rest, None)
        if value is None or value.startswith("--"):
            raise UsageError(f"The argument '{name}' requires a value, but none was supplied.")
        yield name, value


def help_lines(options: Mapping[str, tuple[str | None, str | None, str]]) -> list[str]:
    """A line of help for each option and, the last, for ``--help``.

    options: by name what the value is called (None for a switch), the default and the help.
    """
    names = {
        name: f"  --{name}" + (f" <{value}>" if value else "") for name, (value, _, _) in options.items()
    }
    width = max(map(len, names.values())) + 3
    lines = [
        f"{names[name]:<{width}}{text}" + (f" [default: {default}]" if default else "")
        for name, (_, default, text) in options.items()
    ]
    return [*lines, f"{'  -h, --help':<{width}}Show this help and exit."]
