"""The list of backbones says what find_host says of each."""

import copy

from conftest import HOSTS
from declared_hosts import DECLARED
from mmengine.registry import MODELS

from mona_mm.commands.hosts import LIBRARIES, backbone_rows, render_hosts
from mona_mm.hosts import find_host


def test_every_backbone_is_listed():
    """Each class once, hosts with sites, the others with a reason."""
    rows = backbone_rows()
    assert len({(row.library, row.name) for row in rows}) == len(rows) > 100
    assert {row.library for row in rows} == set(LIBRARIES)
    assert all(bool(row.sites) != bool(row.reason) for row in rows)
    assert len(render_hosts(rows).splitlines()) == len(rows) + 5


def test_the_sites_are_those_of_the_hosts():
    """As of a backbone that was built."""
    rows = {(row.library, row.name): row for row in backbone_rows()}
    for base in (*HOSTS.values(), *DECLARED.values()):
        model = MODELS.build(copy.deepcopy(base))
        row = rows[type(model).__module__.partition('.')[0], type(model).__name__]
        assert row.sites == find_host(model).sites, base['type']
