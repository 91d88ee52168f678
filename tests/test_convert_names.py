"""The converter knows every name of a checkpoint, says which it leaves out, and refuses the others by name."""

import pytest
import torch
from conftest import HOSTS, golden, golden_swin_config, part
from mmengine.registry import MODELS

from mona_mm import PeftBackbone
from mona_mm.checkpoint.convert import convert_model, convert_state_dict, recognise, to_colin, to_published
from mona_mm.errors import CheckpointMismatchError, ConfigError
from mona_mm.methods.lorand import LoRand

LORAND = dict(type='LoRand', inner=4, branches=3)


def with_method(peft, host='mmdet-swin') -> torch.nn.Module:
    torch.manual_seed(5)
    model = PeftBackbone(base=HOSTS[host], peft=peft)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    return model.eval()


def colin_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Swin with LoRand as the CoLin release names it, written independently of the converter."""
    names = {'attn_out': 'lorand1', 'ffn_out': 'lorand2', 'down': 'project1', 'up': 'project2'}
    released = {}
    for name, tensor in state.items():
        block, _, module = name.partition('.peft.')
        if not module:
            released[name] = tensor
            continue
        site, projection, kind = module.split('.')
        place = f'{block}.{names[site]}.{names[projection]}'
        if kind == 'bias':
            released[f'{place}.bias'] = tensor
        else:
            for i, factor in enumerate(tensor):
                released[f'{place}.param_dict.{dict(a="A", g="g", b="B")[kind]}{i}'] = factor
    return released


@pytest.mark.parametrize('whole', [False, True], ids=['backbone', 'detector'])
def test_lorand_of_the_colin_release_and_back(whole):
    """Its numbered factors load strictly into a Swin with LoRand, which computes what it did, and the way back is
    exact; in a detector's checkpoint the rest of the model passes unchanged."""
    source = with_method(LORAND)
    released = colin_names(source.state_dict())
    assert 'stages.0.blocks.0.lorand1.project1.param_dict.A0' in released
    assert recognise(released) == 'colin'
    model = PeftBackbone(base=HOSTS['mmdet-swin'], peft=LORAND).eval()
    model.load_state_dict(convert_state_dict(released), strict=True)
    x = torch.randn(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(model(x), source(x), strict=True))
    if whole:
        released = {**{f'backbone.{name}': t for name, t in released.items()}, 'neck.conv.bias': torch.ones(3)}
    ours = convert_model(dict(state_dict=released))
    assert ('neck.conv.bias' in ours) == whole == ('backbone.norm0.weight' in ours)
    again = to_colin(ours)
    assert again.keys() == released.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in released.items())


def test_the_published_module_under_the_names_of_the_colin_release():
    """The golden LoRand module, named as the release names it, gives the golden output."""
    tensors, _ = golden('lorand_module')
    published = part(tensors, 'state/')
    block = 'stages.0.blocks.0.lorand1.'
    ours = convert_state_dict({f'{block}{name}': tensor for name, tensor in published.items()})
    prefix = 'stages.0.blocks.0.peft.attn_out.'
    a = ours[f'{prefix}down.a']
    lorand = LoRand(a.shape[1], inner=a.shape[2], branches=a.shape[0])
    lorand.load_state_dict(part(ours, prefix), strict=True)
    inputs, output = tensors['input'], next(tensors[key] for key in ('output', 'output/0') if key in tensors)
    shape = inputs.shape
    out = lorand(inputs.reshape(1, -1, shape[-1]), (1, inputs.numel() // shape[-1])).reshape(shape)
    torch.testing.assert_close(out, output, atol=1e-5 * float(output.abs().max()), rtol=0)


COLIN = dict(type='CoLin', bottleneck=12, rank=4, branches=3)


def released_colin(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Swin with CoLin as its release names it, written independently of the converter: scales are columns, the gate
    is of a map's shape, and the second projection holds the first one."""
    released = {}
    for name, tensor in state.items():
        block, _, rest = name.partition('.peft.')
        if not rest:
            released[name] = tensor
            continue
        site, _, rest = rest.partition('.')
        place = f'{block}.colin{1 if site == "post_attn" else 2}.'
        first = {'down.a': 'param_dict.A', 'down.b': 'param_dict.B', 'down.bias': 'bias'}
        others = {
            'up.a': 'project2.param_dict.A', 'up.b': 'project2.param_dict.B', 'up.bias': 'project2.bias',
            'depthwise.weight': 'inner_op.weight', 'depthwise.bias': 'inner_op.bias',
        }  # fmt: skip
        for copy in ('project1.', 'project2.upProjection.'):
            if rest in first:
                released[f'{place}{copy}{first[rest]}'] = tensor.clone()
            elif rest == 'g':
                released |= {f'{place}{copy}param_dict.g{i}': tensor[i].reshape(4, 1) for i in range(3)}
        if rest in others:
            released[place + others[rest]] = tensor
        elif rest == 'depthwise.gate':
            released[f'{place}inner_scale'] = tensor.reshape(1, 12, 1, 1)
    return released


def test_colin_of_its_release_and_back():
    """It loads strictly into a Swin with CoLin, which computes what it did; the way back is exact, the copies of the
    first projection included."""
    source = with_method(COLIN)
    released = released_colin(source.state_dict())
    assert 'stages.0.blocks.0.colin1.project2.upProjection.param_dict.g2' in released
    assert recognise(released) == 'colin'
    model = PeftBackbone(base=HOSTS['mmdet-swin'], peft=COLIN).eval()
    model.load_state_dict(convert_state_dict(released), strict=True)
    x = torch.randn(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(model(x), source(x), strict=True))
    whole = {f'backbone.{name}': tensor for name, tensor in released.items()}
    again = to_colin(convert_model(dict(state_dict=whole)))
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize('change', ['other values', 'absent'])
def test_copies_of_a_projection_that_differ(change):
    released = released_colin(with_method(COLIN).state_dict())
    name = 'stages.1.blocks.0.colin2.project1.param_dict.g1'
    if change == 'absent':
        released.pop(name)
    else:
        released[name] = released[name] + 1
    with pytest.raises(CheckpointMismatchError, match=r'colin2\.project2\.upProjection\.param_dict\.g1 differs'):
        convert_state_dict(released)


def test_adapters_of_the_colin_release():
    source = with_method(dict(type='Adapter', bottleneck=8))
    names = dict(attn_branch='adapter1', ffn_branch='adapter2', down='project1', up='project2')
    released = {}
    for name, tensor in source.state_dict().items():
        old = name
        for ours, theirs in names.items():
            old = old.replace(f'.{ours}.', f'.{theirs}.') if '.peft.' in name else old
        released[old.replace('.peft.', '.')] = tensor
    assert 'stages.0.blocks.0.adapter1.project1.weight' in released
    source.load_state_dict(convert_state_dict(released), strict=True)
    assert to_colin(source.state_dict()).keys() == released.keys()


def test_no_way_to_the_colin_release():
    for peft in (dict(type='Mona', bottleneck=4), dict(type='LoRA', rank=2)):
        with pytest.raises(ConfigError, match='the CoLin release has no such module'):
            to_colin(with_method(peft).state_dict())
    with pytest.raises(ConfigError, match='the published code has no such module'):
        to_published(with_method(COLIN).state_dict())
    with pytest.raises(ConfigError, match='Swin'):
        to_colin(MODELS.build(HOSTS['mmpretrain-vit']).state_dict())


def to_microsoft(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """mmdet's names in Microsoft's; the order of channels does not matter here."""
    names = {'stages.': 'layers.', 'attn.w_msa.': 'attn.', 'ffn.layers.0.0.': 'mlp.fc1.', 'ffn.layers.1.': 'mlp.fc2.'}
    published = {}
    for name, tensor in state.items():
        for ours, theirs in {**names, 'patch_embed.projection.': 'patch_embed.proj.'}.items():
            name = name.replace(ours, theirs)
        published[name] = tensor
    return published


def checkpoints() -> dict[str, dict[str, torch.Tensor]]:
    """By format a checkpoint of it."""
    swin = MODELS.build(HOSTS['mmdet-swin']).state_dict()
    vit = MODELS.build(HOSTS['mmpretrain-vit']).state_dict()
    convnext = MODELS.build(HOSTS['mmpretrain-convnext']).state_dict()
    timm = {}
    for name, tensor in vit.items():
        name = name.replace('layers.', 'blocks.', 1) if name.startswith('layers.') else name
        name = name.replace('ffn.layers.0.0', 'mlp.fc1').replace('ffn.layers.1', 'mlp.fc2').replace('.ln', '.norm')
        timm[name.replace('ln1.', 'norm.').replace('projection', 'proj')] = tensor
    dwconv = {
        name.replace('depthwise_conv', 'dwconv').replace('pointwise_conv', 'pwconv'): t for name, t in convnext.items()
    }
    return {
        'swin': to_microsoft(swin),
        'colin': colin_names(with_method(LORAND).state_dict()),
        'vit': timm,
        'convnext': dwconv,
        'pvt': {
            **{f'patch_embed1.proj.{end}': torch.zeros(16) for end in ('weight', 'bias')},
            'block1.0.attn.q.weight': torch.zeros(16, 16),
            'block1.0.attn.kv.weight': torch.zeros(32, 16),
        },
        'mm': swin,
    }


UNKNOWN = {
    'swin': ['layers.0.blocks.0.prompt', 'layers.0.blocks.1.my_module_1.extra.weight', 'tokens'],
    'colin': ['stages.0.blocks.0.colin1.project1.param_dict.C', 'stages.0.blocks.0.lorand1.project1.param_dict.A'],
    'vit': ['prompt_tokens', 'blocks.0.attn.q_bias', 'blocks.0.adapter.down.weight'],
    'convnext': ['stages.0.0.adapter.weight', 'scale'],
    'pvt': ['block1.0.adapter.weight', 'prompt'],
    'mm': ['stages.0.blocks.0.my_adapter.weight', 'prompts', 'stages.0.blocks.0.attn.lora_A'],
}


@pytest.mark.parametrize('form', UNKNOWN)
def test_unknown_names_are_refused(form, tool, tmp_path):
    """What a known format's checkpoint holds beside it is named, by the converter and by the tool, which writes
    nothing; without it, the checkpoint converts."""
    known = checkpoints()[form]
    assert recognise(known) == form
    converted = convert_state_dict(known)
    assert converted
    for name in UNKNOWN[form]:
        with pytest.raises(CheckpointMismatchError, match=name.rpartition('.')[2]):
            convert_state_dict({**known, name: torch.zeros(3)})
    torch.save({**known, UNKNOWN[form][0]: torch.zeros(3)}, tmp_path / 'a.pth')
    status, _, err = tool('convert_checkpoint.py', str(tmp_path / 'a.pth'), str(tmp_path / 'out.pth'))
    assert status == 2 and UNKNOWN[form][0].rpartition('.')[2] in err and not (tmp_path / 'out.pth').exists()
    torch.save(known, tmp_path / 'b.pth')
    status, _, err = tool('convert_checkpoint.py', str(tmp_path / 'b.pth'), str(tmp_path / 'out.pth'))
    assert status == 0, err
    assert torch.load(tmp_path / 'out.pth', weights_only=True)['state_dict'].keys() == converted.keys()


def test_what_is_left_out_is_said(tool, tmp_path):
    whole = to_microsoft(MODELS.build(HOSTS['mmdet-swin']).state_dict())
    gone = ('norm.weight', 'norm.bias', 'head.weight', 'head.bias', 'layers.0.blocks.1.attn_mask')
    torch.save(dict(model={**whole, **{name: torch.zeros(1) for name in gone}}), tmp_path / 'a.pth')
    status, out, err = tool('convert_checkpoint.py', str(tmp_path / 'a.pth'), str(tmp_path / 'out.pth'))
    assert status == 0, err
    assert f'left out, because no backbone has them: {", ".join(gone)}' in out


def test_two_tensors_of_one_name_and_missing_factors():
    """Nothing is overwritten in silence, and no factor of a sum is missing."""
    known = checkpoints()
    with pytest.raises(CheckpointMismatchError, match=r'would both become patch_embed\.projection\.bias'):
        convert_state_dict({**known['swin'], 'patch_embed.projection.bias': torch.zeros(3)})
    lacking = {n: t for n, t in known['colin'].items() if n != 'stages.0.blocks.0.lorand1.project1.param_dict.g1'}
    with pytest.raises(CheckpointMismatchError, match=r'attn_out\.down\.g: the factors are numbered \[0, 2\]'):
        convert_state_dict(lacking)


def test_no_module_of_ours_gets_a_published_name_by_chance():
    """A Mona of another design than the published one, whose names nearly are."""
    tensors, metadata = golden('swin_mona')
    base = dict(type='mmdet.SwinTransformer', **golden_swin_config(metadata))
    with pytest.raises(ConfigError, match=r'middle.*the published code has no such module'):
        model = PeftBackbone(base=base, peft=dict(type='Mona', scaled_norm=['down', 'pointwise']))
        to_published(model.state_dict())
    assert to_published(convert_state_dict(part(tensors, 'state/')))
