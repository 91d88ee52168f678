"""What is wrong in the declaration of a host is said by name: when it is declared, attached to, or first called."""

import pytest
import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import nn

import mona_mm
from mona_mm import PeftBackbone
from mona_mm.errors import ConfigError, UnsupportedHostError
from mona_mm.hosts import (
    HOSTS,
    BlockSpec,
    Branch,
    GridArgument,
    GridAttribute,
    GridSource,
    Host,
    fused_qkv,
    grid_of_map,
    register_blocks,
    separate_linears,
)

METHODS = dict(
    mona=dict(type='Mona', bottleneck=4),
    adapter=dict(type='Adapter', bottleneck=4),
    lora=dict(type='LoRA', rank=2, sites=['fc1', 'fc2']),
)


class PlainBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.mix, self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.end1, self.end2, self.unused = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x):
        x = x + self.end1(self.mix(self.norm1(x)))
        return x + self.end2(self.fc2(self.fc1(self.norm2(x)).relu()))


@MODELS.register_module()
class PlainNet(BaseModule):
    def __init__(self):
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, 8, 4, stride=4), nn.ModuleList([PlainBlock()])

    def forward(self, x):
        x = self.patches(x)
        grid = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return (x.transpose(1, 2).unflatten(2, grid),)


@pytest.fixture(autouse=True)
def hosts():
    """What a test declares is gone after it."""
    before = dict(HOSTS)
    yield HOSTS
    HOSTS.clear()
    HOSTS.update(before)


def declare(**changes):
    right = dict(
        cls=PlainBlock,
        linears=separate_linears(fc1='fc1', fc2='fc2', proj='mix'),
        branches=dict(attn=Branch('end1'), ffn=Branch('end2')),
        mid_norm='norm2',
        grid=GridSource('patches', grid_of_map),
    )
    mona_mm.register_host(PlainNet, Host(specs=(BlockSpec(**{**right, **changes}),)))


def run(method):
    return PeftBackbone(base=dict(type='PlainNet'), peft=METHODS[method])(torch.randn(2, 3, 16, 8))


@pytest.mark.parametrize('method', METHODS)
def test_a_right_declaration(method):
    """Classes may be given themselves in place of their names."""
    declare()
    assert f'{__name__}.PlainNet' in HOSTS
    assert run(method)[0].shape == (2, 8, 4, 2)


WHEN_DECLARED = {
    'a branch that there is not': (dict(branches=dict(attention=Branch('end1'))), "'attention'.*attn, ffn"),
    'a path for a branch': (dict(branches=dict(ffn='end2')), 'branches must map each name to a Branch'),
    'a site that there is not': (dict(linears=separate_linears(fc2='fc2', gate='fc1')), "'gate'.*q, k, v, proj, fc1"),
    'a path for a linear layer': (dict(linears=dict(fc2='fc2')), 'linears must map each name to a Linear'),
    'a layout that there is not': (dict(layout='NHWC'), "layout has 'NHWC'.*BNC, BHWC, BCHW"),
    'a site left out that there is not': (dict(without=('post_atn',)), "'post_atn'.*post_attn"),
    'no width': (dict(linears=separate_linears(fc1='fc1')), r'fc2, `width` must name a parameter'),
    'a name without a module': (dict(cls='PlainBlock'), "cls='PlainBlock' must be a class, or its qualified name"),
}


@pytest.mark.parametrize('case', WHEN_DECLARED)
def test_refused_when_declared(case):
    changes, message = WHEN_DECLARED[case]
    with pytest.raises(ConfigError, match=message):
        declare(**changes)


WHEN_ATTACHED = {
    'no such norm': ('mona', dict(mid_norm='norm3'), "mid_norm 'norm3', and the block has no such.* It has norm1, "),
    'no such residual': ('mona', dict(mid_residual='scale'), "mid_residual 'scale', and the block has no such module"),
    'no such end': ('adapter', dict(branches=dict(attn=Branch('end1'), ffn=Branch('end'))), "branch 'ffn' with 'end'"),
    'no such width': ('mona', dict(width='norm.weight'), "width='norm.weight', and the block has no such parameter"),
    'a norm as linear layer': (
        'lora',
        dict(linears=separate_linears(fc1='norm1', fc2='fc2')),
        r"norm1.weight at 'fc1'.*\(8,\) is no weight",
    ),
    'no fused layer': (
        'mona',
        dict(linears={**fused_qkv('mix'), **separate_linears(fc2='fc2')}),
        r"mix.weight at 'q'.*\(8, 8\) is no weight of 3 linear layers in one",
    ),
    'no source of the grid': ('mona', dict(grid=GridSource('patch')), 'nothing around blocks.0 has a patch'),
}


@pytest.mark.parametrize('case', WHEN_ATTACHED)
def test_refused_when_attached(case):
    method, changes, message = WHEN_ATTACHED[case]
    declare(**changes)
    with pytest.raises(ConfigError, match=message):
        PeftBackbone(base=dict(type='PlainNet'), peft=METHODS[method])


WHEN_CALLED = {
    'no grid': ('mona', dict(grid=None), r'PlainBlock \(BlockSpec\) has no `grid`'),
    'no pair in the output': ('mona', dict(grid=GridSource('patches')), 'Conv2d .* returns no pair.*grid_of_map'),
    'no map in the output': (
        'mona',
        dict(grid=GridSource('norm1', grid_of_map, is_in_block=True)),
        r'LayerNorm .* returns no map',
    ),
    'no such argument': ('mona', dict(grid=GridArgument(('H', 'W'))), 'has no H and W among its arguments'),
    'no such attribute': ('mona', dict(grid=GridAttribute('grid_size')), r"GridAttribute\('grid_size'\)"),
    'another width': ('mona', dict(width='fc1.weight'), r'\(2, 8, 8\), which is not 16 wide in the layout BNC'),
    'an end that is not called': ('adapter', dict(branches=dict(ffn=Branch('unused'))), 'does not call .*ffn_branch'),
    'an end that is called once': (
        'adapter',
        dict(branches=dict(ffn=Branch('end2', call=1))),
        'not as often, so .*`call` of the Branch',
    ),
}


@pytest.mark.parametrize('case', WHEN_CALLED)
def test_refused_when_called(case):
    method, changes, message = WHEN_CALLED[case]
    declare(**changes)
    peft = dict(METHODS[method], **(dict(sites=['ffn_branch']) if method == 'adapter' else {}))
    backbone = PeftBackbone(base=dict(type='PlainNet'), peft=peft)
    with pytest.raises(ConfigError, match=message):
        backbone(torch.randn(2, 3, 16, 8))


def test_why_no_block_fits():
    """The error names the classes that are described, or what their blocks are without."""
    declare(cls='elsewhere.PlainBlock')
    with pytest.raises(UnsupportedHostError, match=r'no block of the classes .* \(elsewhere.PlainBlock\)'):
        run('mona')
    register_blocks(PlainNet, BlockSpec(cls=PlainBlock, linears=separate_linears(fc2='fc3'), branches={}))
    with pytest.raises(UnsupportedHostError, match=r'its blocks \(PlainBlock\) are without fc3.weight, '):
        run('mona')


def test_what_is_no_host():
    """It is refused when it is declared, and leaves the list of hosts as it was."""
    spec = BlockSpec(cls=PlainBlock, linears=separate_linears(fc2='fc2'), branches={})
    before = dict(HOSTS)
    for host in (Host(specs=()), Host(specs=spec)):
        with pytest.raises(ConfigError, match='PlainNet needs the descriptions of its classes of blocks'):
            mona_mm.register_host(PlainNet, host)
    for host in (spec, dict(specs=(spec,))):
        with pytest.raises(ConfigError, match=r'must be a mona_mm\.hosts\.Host'):
            mona_mm.register_host(PlainNet, host)
    with pytest.raises(ConfigError, match="backbone='PlainNet' must be a class, or its qualified name"):
        mona_mm.register_host('PlainNet', Host(specs=(spec,)))
    with pytest.raises(ConfigError, match='PlainNet is no host'):
        register_blocks(PlainNet, spec)
    assert before == HOSTS
    mona_mm.register_host(PlainNet, Host(specs=(spec,)))
    with pytest.raises(ConfigError, match='PlainNet needs the descriptions'):
        register_blocks(PlainNet)
