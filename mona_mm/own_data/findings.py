"""What was found in data: errors that forbid training, and warnings, each with a count and the first example."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from mona_mm.errors import ConfigError


@dataclass
class Finding:
    """One kind of fault.

    Args:
        text: what is wrong, in words that follow a count: ``'boxes lie outside their image'``.
        fix: what to do about it, or what has been done.
        count: how often it occurs.
        first: the first example.
    """

    text: str
    fix: str
    count: int = 0
    first: str = ''

    def line(self) -> str:
        """The finding in one line."""
        example = f' ({"first: " if self.count > 1 else ""}{self.first})' if self.first else ''
        fix = f'; {self.fix}' if self.fix else ''
        return f'{self.count} {self.text}{example}{fix}' if self.count else f'{self.text}{example}{fix}'


@dataclass
class Findings:
    """The faults of data, grouped by kind."""

    errors: dict[str, Finding] = field(default_factory=dict)
    warnings: dict[str, Finding] = field(default_factory=dict)

    def error(self, text: str, first: object = '', fix: str = '', count: int = 1) -> None:
        """Note a fault that forbids training."""
        _add(self.errors, text, first, fix, count)

    def warn(self, text: str, first: object = '', fix: str = '', count: int = 1) -> None:
        """Note a fault that training survives."""
        _add(self.warnings, text, first, fix, count)

    def merge(self, other: 'Findings') -> None:
        """Add the faults of ``other``."""
        for mine, theirs in ((self.errors, other.errors), (self.warnings, other.warnings)):
            for finding in theirs.values():
                _add(mine, finding.text, finding.first, finding.fix, finding.count)

    def raise_errors(self, most: int = 5) -> None:
        """Raise the errors, one line each.

        Raises:
            ConfigError: if there are any.
        """
        if self.errors:
            lines = [finding.line() for finding in self.errors.values()]
            more = [f'... and {len(lines) - most} more kinds of errors'] if len(lines) > most else []
            raise ConfigError('\nerror: '.join(lines[:most] + more))

    def warning_lines(self) -> list[str]:
        """The warnings, one line each."""
        return [f'warning: {finding.line()}' for finding in self.warnings.values()]


def _add(found: dict[str, Finding], text: str, first: object, fix: str, count: int) -> None:
    finding = found.setdefault(text, Finding(text, fix, first=' '.join(str(first).split())))
    finding.count += count


def short(names: Iterable[object], most: int = 10, separator: str = ', ') -> str:
    """The first names of many in one line."""
    names = [str(name) for name in names]
    return separator.join(names[:most]) + (f'{separator}...' if len(names) > most else '')
