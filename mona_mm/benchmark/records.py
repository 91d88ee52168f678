"""The file of the measured figures, which a killed run leaves behind too; several files can be read as one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from mona_mm.benchmark import backbone, hf_peft, module, plain, spt
from mona_mm.checkpoint.atomic import AtomicLocalBackend
from mona_mm.errors import ConfigError, MissingFileError

SUITES = {'module': module, 'backbone': backbone, 'detector': backbone, 'spt': spt, 'hf-peft': hf_peft, 'plain': plain}
"""The suites by name, each with the module that has its ``Row``, ``header`` and ``line``."""


def write_record(path: str, machine: Mapping[str, str], results: Mapping[str, Sequence[Any]]) -> None:
    """Write the rows of every suite and a description of the machine as JSON; the file appears whole or not at all.

    Raises:
        ConfigError: if the file cannot be written.
    """
    record = dict(machine=machine, **{suite: [asdict(row) for row in rows] for suite, rows in results.items()})
    AtomicLocalBackend().put_text(json.dumps(record, indent=1) + '\n', path)


def read_records(paths: Sequence[str]) -> tuple[list[dict[str, str]], dict[str, list]]:
    """Read the machines and the rows, by suite, of several files; of rows that measure the same, the last is kept.

    Raises:
        MissingFileError: if a file does not exist.
        ConfigError: if a file was not written by :func:`write_record`.
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
    """The identity of a row: every field up to the variant, and whether the row is one of inference."""
    names = [field.name for field in fields(row)]
    return (*(getattr(row, name) for name in names[: names.index('variant') + 1]), row.step is None)
