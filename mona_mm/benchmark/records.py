"""Figures as a file that a killed run leaves behind, and several of them read as one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from mona_mm.benchmark import backbone, module, spt
from mona_mm.checkpoint.atomic import AtomicLocalBackend
from mona_mm.errors import ConfigError, MissingFileError

SUITES = dict(module=module, backbone=backbone, detector=backbone, spt=spt)
"""Names, and where their ``Row``, ``header`` and ``line`` are."""


def write_record(path: str, machine: Mapping[str, str], results: Mapping[str, Sequence[Any]]) -> None:
    """Write the rows of every suite and what they were measured on, as JSON; the file appears whole or not at all.

    Raises:
        ConfigError: if there can be no such file.
    """
    record = dict(machine=machine, **{suite: [asdict(row) for row in rows] for suite, rows in results.items()})
    AtomicLocalBackend().put_text(json.dumps(record, indent=1) + '\n', path)


def read_records(paths: Sequence[str]) -> tuple[list[dict[str, str]], dict[str, list]]:
    """The machines, and the rows of all files by suite; of what is measured in two files the later file's.

    Raises:
        MissingFileError: if there is no such file.
        ConfigError: if one is no such file.
    """
    machines: list[dict[str, str]] = []
    found: dict[str, dict[tuple, Any]] = {}
    for path in paths:
        try:
            with open(path, encoding='utf-8') as file:
                record = json.load(file)
            machines.append(dict(record.pop('machine')))
            for suite, rows in record.items():
                for values in rows:
                    row = SUITES[suite].Row(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
                    found.setdefault(suite, {})[_key(row)] = row
        except (FileNotFoundError, IsADirectoryError):
            raise MissingFileError(f'--from-json {path}: there is no such file.') from None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f'--from-json {path} was not written by --json of this version: {error!r}.') from None
    return machines, {suite: list(rows.values()) for suite, rows in found.items()}


def _key(row: Any) -> tuple:
    """What was measured: every field up to the variant, and whether it is inference."""
    names = [field.name for field in fields(row)]
    return (*(getattr(row, name) for name in names[: names.index('variant') + 1]), row.step is None)
