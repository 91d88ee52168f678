"""Every backbone of the OpenMMLab libraries, and the models of timm and transformers that are hosts in a wrapper.

Of each it says whether it is a host, its sites, or why it is none. Neither timm nor transformers need be installed.
"""

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module

from torch import nn

from mona_mm.hosts import HOSTS, LINEAR_SITES, REFUSED, STREAM_SITES, BlockSpec, Host
from mona_mm.nn.mixin import qualified_name

_OPENMMLAB = ('mmdet', 'mmseg', 'mmpretrain')

LIBRARIES = (*_OPENMMLAB, 'timm', 'transformers')

_BLOCKS = ('Block', 'Layer', 'Bottleneck')

_NO_PLACE = 'not declared: any of its parameters can be frozen or trained with mona_mm.FrozenModel'


@dataclass(frozen=True)
class BackboneRow:
    """One backbone class, or one family of models that a wrapper of another library's models can hold.

    Args:
        library: The library that it is from.
        name: The name of the class or family.
        sites: The sites at which methods can attach, empty if it is no host.
        by_weight: Those of the sites that only an addition to a weight can be at; of a family, in every kind of block.
        unordered: Whether its tokens are in another order than that of the grid's rows.
        reason: Why it is no host; empty if it is one.
    """

    library: str
    name: str
    sites: tuple[str, ...] = ()
    by_weight: tuple[str, ...] = ()
    unordered: bool = False
    reason: str = ''


def backbone_rows() -> list[BackboneRow]:
    """A row for every backbone class that the installed libraries export, and for every family of a wrapper."""
    return [*(_row(library, cls) for library in _OPENMMLAB for cls in _backbones(library)), *_families()]


def _families() -> Iterator[BackboneRow]:
    families: dict[tuple[str, str], list[BlockSpec]] = {}
    for spec in (spec for host in HOSTS.values() for spec in host.specs if spec.family):
        families.setdefault((spec.cls.partition('.')[0], spec.family), []).append(spec)
    for (library, family), specs in families.items():
        called = {site for spec in specs for site, linear in spec.linears.items() if linear.is_called}
        yield _host_row(library, family, Host(specs=tuple(specs)), called)


def _host_row(library: str, name: str, host: Host, called: Iterable[str] = ()) -> BackboneRow:
    by_weight = tuple(site for site, linear in host.linears.items() if not linear.is_called and site not in called)
    return BackboneRow(library, name, host.sites, by_weight, not any(spec.row_major for spec in host.specs))


def _backbones(library: str) -> Iterator[type[nn.Module]]:
    module = import_module(f'{library}.models.backbones')
    for name in sorted(getattr(module, '__all__', vars(module))):
        cls = getattr(module, name)
        if inspect.isclass(cls) and issubclass(cls, nn.Module):
            yield cls


def _row(library: str, cls: type[nn.Module]) -> BackboneRow:
    for base in cls.__mro__:
        name = qualified_name(base)
        if name in REFUSED:
            return BackboneRow(library, cls.__name__, reason=REFUSED[name])
        if name in HOSTS and _builds_blocks_of(cls, base, HOSTS[name]):
            return _host_row(library, cls.__name__, HOSTS[name])
    return BackboneRow(library, cls.__name__, reason=_NO_PLACE)


def _builds_blocks_of(cls: type, base: type, host: Host) -> bool:
    """Whether a class that derives from a host has that host's blocks, as far as its module defines none of its own."""
    known = {spec.cls for spec in host.specs}
    defined = [value for value in vars(inspect.getmodule(cls)).values() if inspect.isclass(value)]
    own = {qualified_name(value) for value in defined if value.__module__ == cls.__module__ != base.__module__}
    return not any(name.endswith(_BLOCKS) for name in own - known)


def render_hosts(rows: list[BackboneRow]) -> str:
    """The rows as a Markdown table, hosts first in each library."""
    lines = ['| library | backbone | stream sites | linear sites |', '|---|---|---|---|']
    for row in sorted(rows, key=lambda row: (LIBRARIES.index(row.library), bool(row.reason), row.name.lower())):
        if row.reason:
            lines.append(f'| {row.library} | {row.name} | - | {row.reason} |')
            continue
        stream = [f'{site}†' if row.unordered else site for site in STREAM_SITES if site in row.sites]
        linear = [f'{site}*' if site in row.by_weight else site for site in LINEAR_SITES if site in row.sites]
        lines.append(f'| {row.library} | {row.name} | {" ".join(stream)} | {" ".join(linear) or "-"} |')
    count = sum(not row.reason for row in rows)
    lines.append('')
    lines.append(
        f'{count} of {len(rows)} backbones are hosts. At a site with * the host reads the weight itself, so that'
    )
    lines.append(
        'only a method that adds to that weight can be there: LoRA without dropout, or single weights. At a site with '
        "† the tokens are in another order than the grid's rows, and methods that read the grid (Mona) are refused. "
        "timm's models are in a `TIMMBackbone` of mmpretrain or mmseg, those of transformers in a `mona_mm.HFBackbone`."
    )
    return '\n'.join(lines)


def render_names(rows: list[BackboneRow]) -> str:
    """The names of the hosts of each library, as a Markdown table."""
    lines = ['| library | backbones |', '|---|---|']
    for library in LIBRARIES:
        names = sorted((row.name for row in rows if row.library == library and not row.reason), key=str.lower)
        lines.append(f'| {library} | {", ".join(f"`{name}`" for name in names)} |')
    return '\n'.join(lines)
