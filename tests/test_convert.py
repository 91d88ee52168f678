"""Checkpoints in every format that people have: recognised, converted, complete, and computing what they did."""

import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import HOSTS, ROOT, VIT, golden, golden_swin_config, part
from helpers import assert_near, to_microsoft
from mmengine.model import BaseModule
from mmengine.registry import MODELS, init_default_scope
from small_models import SmallModel  # noqa: F401  registered

from mona_mm import FrozenModel, PeftBackbone, save_delta
from mona_mm.checkpoint.convert import convert_model, convert_state_dict, recognise, to_published
from mona_mm.checkpoint.pretrained import load_pretrained, read_checkpoint
from mona_mm.config.load import adapt_to_device, load_config
from mona_mm.errors import CheckpointMismatchError, ConfigError
from mona_mm.hooks.load_check import _class_layers

PUBLISHED = {
    'mona': dict(type='Mona'),
    'adapter': dict(type='Adapter'),
    'adaptformer': dict(type='AdaptFormer'),
    'lora': dict(type='LoRA'),
}


def randomised(host: str, **changes) -> torch.nn.Module:
    """A small stock backbone all of whose values are random."""
    model = MODELS.build({**HOSTS[host], **changes})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.eval()
    return model


def assert_loads(host: str, file: Path, source: torch.nn.Module, absent: str = r'norm\d\.') -> None:
    """A PeftBackbone with this file has the weights of ``source``, but for the names that match ``absent``."""
    base = dict(HOSTS[host], init_cfg=dict(type='Pretrained', checkpoint=str(file)))
    model = PeftBackbone(base=base, peft=dict(type='Adapter', bottleneck=8))
    model.init_weights()
    expected = source.state_dict()
    own = {name: t for name, t in model.state_dict().items() if '.peft.' not in name}
    assert own.keys() == expected.keys()
    wrong = [n for n, t in own.items() if not torch.equal(t, expected[n]) and not re.match(absent, n)]
    assert not wrong, wrong[:5]


@pytest.mark.parametrize('method', PUBLISHED)
@pytest.mark.parametrize('whole', [False, True], ids=['backbone', 'detector'])
def test_published_names_and_back(method, whole):
    """The published state dicts load strictly through the public converter, and the way back is exact: names, order of
    channels, every bit; in a detector's checkpoint the rest of the model passes unchanged."""
    tensors, metadata = golden(f'swin_{method}')
    published = part(tensors, 'state/')
    base = dict(type='mmdet.SwinTransformer', **golden_swin_config(metadata))
    PeftBackbone(base=base, peft=PUBLISHED[method]).load_state_dict(convert_state_dict(published), strict=True)
    if whole:
        published = {
            **{f'backbone.{name}': t for name, t in published.items()},
            'rpn_head.rpn_conv.bias': torch.ones(3),
        }
    ours = convert_model({'state_dict': published})
    assert ('backbone.stages.0.blocks.0.norm1.weight' in ours) == whole == ('rpn_head.rpn_conv.bias' in ours)
    again = to_published(ours)
    assert again.keys() == published.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in published.items())


def test_published_lorand_and_back():
    """LoRand's numbered factors, of which the published module is one of two in a block."""
    tensors, _ = golden('lorand_module')
    blocks = [f'layers.0.blocks.0.my_module_{i}.' for i in (1, 2)]
    published = {f'{block}{name}': t for block in blocks for name, t in part(tensors, 'state/').items()}
    published['layers.0.blocks.0.attn.qkv.weight'] = torch.ones(3, 1)
    again = to_published(convert_state_dict(published))
    assert again.keys() == published.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in published.items())


def test_no_way_back_for_what_was_never_published():
    """A ViT, and a method at a site that the published code does not have."""
    with pytest.raises(ConfigError, match='Only a Swin'):
        to_published(MODELS.build(HOSTS['mmpretrain-vit']).state_dict())
    model = PeftBackbone(base=HOSTS['mmdet-swin'], peft=dict(type='LoRA', rank=2, sites=['fc1']))
    with pytest.raises(ConfigError, match='the published code has no such module'):
        to_published(model.state_dict())


@pytest.mark.parametrize('library', ['mmdet', 'mmseg'])
def test_microsoft_file_of_the_golden_base_gives_the_golden_outputs(library, tmp_path):
    """Microsoft's format made from the tensors of the golden run (with a classifier and masks, which a backbone has no
    use for), through init_cfg, and the golden Mona on it: the golden outputs."""
    tensors, metadata = golden('swin_mona')
    state = part(tensors, 'state/')
    microsoft = {name: t for name, t in state.items() if 'my_module' not in name and not re.match(r'norm\d', name)}
    microsoft.update(
        {'head.weight': torch.ones(5, 8), 'norm.weight': torch.ones(8), 'layers.0.blocks.1.attn_mask': torch.ones(1)}
    )
    torch.save({'model': microsoft}, tmp_path / 'swin.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'swin.pth'))
    base = dict(type=f'{library}.SwinTransformer', init_cfg=init_cfg, **golden_swin_config(metadata))
    model = PeftBackbone(base=base, peft=dict(type='Mona'))
    model.init_weights()
    rest = {name: t for name, t in convert_state_dict(state).items() if '.peft.' in name or re.match(r'norm\d', name)}
    assert not model.load_state_dict(rest, strict=False).unexpected_keys
    model.eval()
    for i, out in enumerate(model(tensors['input'])):
        assert_near(out, tensors[f'output/{i}'])


@pytest.mark.parametrize('host', ['mmdet-swin', 'mmseg-swin', 'mmpretrain-swin', 'mmpretrain-swinv2'])
@pytest.mark.parametrize('source', ['microsoft', 'timm'])
def test_swin(host, source, tmp_path):
    """Microsoft's and timm's Swin and SwinV2: timm counts the merging of patches to the beginning of a stage."""
    changes = dict(arch=dict(HOSTS[host]['arch'], extra_norm_every_n_blocks=0)) if 'v2' in host else {}
    model = randomised(host, **changes)
    published = {}
    for name, tensor in to_microsoft(model.state_dict()).items():
        if 'v2' in host and '.downsample.norm.' in name:
            tensor = model.state_dict()[name.replace('layers.', 'stages.')]  # after the reduction: nothing to re-order
        stage = int(name.split('.')[1]) if '.downsample.' in name else 0
        if '.downsample.' in name and ('v2' in host) != (source == 'timm'):
            name = name.replace(f'layers.{stage}', f'layers.{stage + (1 if source == "timm" else -1)}')
        published[name.replace('head.', 'head.fc.' if source == 'timm' else 'head.')] = tensor
    torch.save(published, tmp_path / 'swin.pth')
    base = dict(HOSTS[host], init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'swin.pth')), **changes)
    loaded = PeftBackbone(base=base, peft=dict(type='Mona', bottleneck=8))
    loaded.init_weights()
    state, expected = loaded.state_dict(), model.state_dict()
    assert all(torch.equal(state[name], t) for name, t in expected.items() if not re.match(r'norm\d', name))


def to_timm_vit(state: dict) -> dict:
    """mmpretrain's ViT in timm's names: written independently of the converter."""
    names = {'ln1': 'norm1', 'ln2': 'norm2', 'ffn.layers.0.0': 'mlp.fc1', 'ffn.layers.1': 'mlp.fc2'}
    published = {}
    for name, tensor in state.items():
        if name.startswith('layers.'):
            for ours, theirs in names.items():
                name = name.replace(f'.{ours}.', f'.{theirs}.')
            name = name.replace('layers.', 'blocks.', 1)
        else:
            name = name.replace('ln1.', 'norm.').replace('projection', 'proj')
        published[name] = tensor
    return published


def reference_vit(state: dict, x: torch.Tensor, heads: int) -> torch.Tensor:
    """A ViT with a class token, computed from timm's names alone; ``(B, 1 + N, D)`` after the last norm."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f'{name}.weight'], state[f'{name}.bias'], 1e-6)

    def linear(x, name):
        return F.linear(x, state[f'{name}.weight'], state[f'{name}.bias'])

    x = F.conv2d(x, state['patch_embed.proj.weight'], state['patch_embed.proj.bias'], stride=16)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat((state['cls_token'].expand(len(x), -1, -1), x), 1) + state['pos_embed']
    for i in range(sum(re.fullmatch(r'blocks\.\d+\.norm1\.bias', name) is not None for name in state)):
        q, k, v = linear(norm(x, f'blocks.{i}.norm1'), f'blocks.{i}.attn.qkv').unflatten(-1, (3, heads, -1)).unbind(2)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        mixed = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = x + linear(mixed.transpose(1, 2).flatten(2), f'blocks.{i}.attn.proj')
        hidden = F.gelu(linear(norm(x, f'blocks.{i}.norm2'), f'blocks.{i}.mlp.fc1'))
        x = x + linear(hidden, f'blocks.{i}.mlp.fc2')
    return norm(x, 'norm')


def google_arrays(timm: dict, heads: int) -> dict[str, np.ndarray]:
    """timm's ViT in the arrays of Google's files."""
    arrays = {}
    blocks = {int(name.split('.')[1]) for name in timm if name.startswith('blocks.')}
    width = timm['norm.bias'].shape[0]
    for i in blocks:
        block = part(timm, f'blocks.{i}.')
        there = f'Transformer/encoderblock_{i}'
        for ours, theirs in (('norm1', 'LayerNorm_0'), ('norm2', 'LayerNorm_2')):
            arrays[f'{there}/{theirs}/scale'] = block[f'{ours}.weight']
            arrays[f'{there}/{theirs}/bias'] = block[f'{ours}.bias']
        attention = f'{there}/MultiHeadDotProductAttention_1'
        for j, name in enumerate(('query', 'key', 'value')):
            rows = slice(j * width, (j + 1) * width)
            arrays[f'{attention}/{name}/kernel'] = block['attn.qkv.weight'][rows].T.reshape(width, heads, -1)
            arrays[f'{attention}/{name}/bias'] = block['attn.qkv.bias'][rows].reshape(heads, -1)
        arrays[f'{attention}/out/kernel'] = block['attn.proj.weight'].T.reshape(heads, -1, width)
        arrays[f'{attention}/out/bias'] = block['attn.proj.bias']
        for j, name in enumerate(('fc1', 'fc2')):
            arrays[f'{there}/MlpBlock_3/Dense_{j}/kernel'] = block[f'mlp.{name}.weight'].T
            arrays[f'{there}/MlpBlock_3/Dense_{j}/bias'] = block[f'mlp.{name}.bias']
    arrays['Transformer/encoder_norm/scale'] = timm['norm.weight']
    arrays['Transformer/encoder_norm/bias'] = timm['norm.bias']
    arrays['Transformer/posembed_input/pos_embedding'] = timm['pos_embed']
    arrays['cls'] = timm['cls_token']
    arrays['embedding/kernel'] = timm['patch_embed.proj.weight'].permute(2, 3, 1, 0)
    arrays['embedding/bias'] = timm['patch_embed.proj.bias']
    arrays['head/kernel'], arrays['head/bias'] = torch.ones(width, 3), torch.ones(3)
    arrays['pre_logits/kernel'], arrays['pre_logits/bias'] = torch.ones(width, width), torch.ones(width)
    return {name: np.asarray(tensor) for name, tensor in arrays.items()}


@pytest.mark.parametrize('source', ['timm', 'timm-safetensors', 'mae', 'moco-v3', 'npz', 'mmpretrain'])
def test_vit(source, tmp_path):
    """A ViT in every format gives what the reference, which knows only timm's names, computes."""
    model = randomised('mmpretrain-vit')
    timm = {name: t.detach().clone() for name, t in to_timm_vit(model.state_dict()).items()}
    heads, file = VIT['num_heads'], tmp_path / 'vit.pth'
    classifier = {'head.weight': torch.ones(3, 32), 'head.bias': torch.ones(3)}
    if source == 'timm':
        torch.save({**timm, **classifier}, file)
    elif source == 'timm-safetensors':
        file = tmp_path / 'vit.safetensors'
        safetensors.torch.save_file({**timm, **classifier}, file)
    elif source == 'mae':
        decoder = {'mask_token': torch.ones(1, 1, 16), 'decoder_embed.weight': torch.ones(16, 32)}
        decoder |= {'decoder_blocks.0.norm1.weight': torch.ones(16), 'decoder_pos_embed': torch.ones(1, 17, 16)}
        torch.save({'model': {**timm, **decoder}, 'epoch': 400}, file)
    elif source == 'moco-v3':
        encoders = {f'module.base_encoder.{name}': t for name, t in timm.items()}
        encoders |= {f'module.momentum_encoder.{name}': -t for name, t in timm.items()}
        encoders |= {'module.base_encoder.head.0.weight': torch.ones(3, 3), 'module.predictor.0.weight': torch.ones(3)}
        torch.save({'state_dict': encoders, 'arch': 'vit_small'}, file)
    elif source == 'npz':
        file = tmp_path / 'vit.npz'
        np.savez(file, **google_arrays(timm, heads))
    else:
        torch.save({'state_dict': {f'backbone.{n}': t for n, t in model.state_dict().items()}}, file)
    assert_loads('mmpretrain-vit', file, model, absent='nothing')
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_near(model(x)[-1], reference_vit(timm, x, heads))


def to_convnext(state: dict, timm: bool) -> dict:
    """mmpretrain's ConvNeXt in the official names, or in timm's."""
    published = {}
    for name, tensor in state.items():
        if re.match(r'norm[0-2]\.', name):
            continue
        official = (
            name.replace('depthwise_conv', 'dwconv').replace('pointwise_conv', 'pwconv').replace('norm3.', 'norm.')
        )
        if not timm:
            # a linear layer there, and a GRN with the whole shape
            tensor = tensor[:, :, 0, 0] if 'pwconv' in official and tensor.dim() == 4 else tensor
            published[official] = tensor.view(1, 1, 1, -1) if '.grn.' in official else tensor
            continue
        name = re.sub(r'^downsample_layers\.0\.', 'stem.', official)
        name = re.sub(r'^downsample_layers\.(\d)\.', r'stages.\1.downsample.', name)
        name = re.sub(r'^stages\.(\d)\.(\d)\.', r'stages.\1.blocks.\2.', name)
        name = name.replace('dwconv', 'conv_dw').replace('pwconv', 'mlp.fc')
        name = name.replace('grn.gamma', 'mlp.grn.weight').replace('grn.beta', 'mlp.grn.bias')
        published[re.sub('^norm', 'head.norm', name)] = tensor
    return {**published, 'head.fc.bias' if timm else 'head.bias': torch.ones(3)}


@pytest.mark.parametrize('timm', [False, True], ids=['official', 'timm'])
@pytest.mark.parametrize('host', ['mmpretrain-convnext', 'mmpretrain-convnextv2'])
def test_convnext(host, timm, tmp_path):
    """The official ConvNeXt (V2) and timm's; a linear layer in the file is a 1x1 convolution in the model."""
    model = randomised(host)
    torch.save({'model': to_convnext(model.state_dict(), timm)}, tmp_path / 'convnext.pth')
    assert_loads(host, tmp_path / 'convnext.pth', model, absent=r'norm[0-2]\.')


def test_pvt(tmp_path):
    """The official PVTv2, whose q and kv are apart."""
    model = randomised('mmdet-pvtv2')
    published = {}
    for name, tensor in model.state_dict().items():
        stage, rest = re.match(r'layers\.(\d)\.(.*)', name).groups()
        stage, width = int(stage) + 1, len(tensor) // 3
        rest = re.sub(r'^1\.(\d+)\.', rf'block{stage}.\1.', rest)
        rest = re.sub(r'^0\.', f'patch_embed{stage}.', re.sub(r'^2\.', f'norm{stage}.', rest))
        rest = rest.replace('projection', 'proj').replace('attn.attn.out_proj', 'attn.proj')
        for ours, theirs in (
            ('ffn.layers.0', 'mlp.fc1'),
            ('ffn.layers.1', 'mlp.dwconv.dwconv'),
            ('ffn.layers.4', 'mlp.fc2'),
        ):
            rest = rest.replace(ours, theirs)
        if 'in_proj' in rest:
            kind = rest.rpartition('_')[2]
            rest = rest.replace(f'attn.in_proj_{kind}', '')
            published[f'{rest}q.{kind}'], published[f'{rest}kv.{kind}'] = tensor[:width], tensor[width:]
        else:
            published[rest] = tensor[:, :, 0, 0] if re.search(r'fc\d\.weight', rest) else tensor
    published['head.weight'] = torch.ones(3, 3)
    torch.save(published, tmp_path / 'pvt.pth')
    assert_loads('mmdet-pvtv2', tmp_path / 'pvt.pth', model, absent='nothing')


def test_the_report_names_what_was_resized(tmp_path):
    """Another image size and another window: the report has the shapes; nothing else is resized or missing."""
    torch.save(to_timm_vit(randomised('mmpretrain-vit', img_size=96).state_dict()), tmp_path / 'vit.pth')
    report = load_pretrained(PeftBackbone(base=HOSTS['mmpretrain-vit']), str(tmp_path / 'vit.pth'))
    assert report.resized == [('pos_embed', (1, 37, 32), (1, 17, 32))]
    assert (report.format, report.missing, report.unexpected) == ('vit', [], [])
    torch.save(to_microsoft(randomised('mmdet-swin', window_size=4).state_dict()), tmp_path / 'swin.pth')
    report = load_pretrained(PeftBackbone(base=HOSTS['mmdet-swin']), str(tmp_path / 'swin.pth'))
    assert {shapes[1:] for shapes in report.resized} == {((49, heads), (169, heads)) for heads in (1, 2, 3, 4)}
    assert set(report.missing) == {f'norm{i}.{kind}' for i in range(4) for kind in ('weight', 'bias')}


@pytest.mark.parametrize('lost', ['blocks.1.attn.qkv.weight', 'pos_embed', 'blocks.2.mlp.fc2.bias'])
def test_less_than_everything_is_an_error(lost, tmp_path):
    """One tensor too few in the file is never a silent partial load."""
    timm = to_timm_vit(randomised('mmpretrain-vit').state_dict())
    timm.pop(lost)
    torch.save(timm, tmp_path / 'vit.pth')
    with pytest.raises(CheckpointMismatchError, match='missing: '):
        assert_loads('mmpretrain-vit', tmp_path / 'vit.pth', None)


@pytest.mark.parametrize('kind', ['host', 'inside', 'other', 'prefix', 'model'])
def test_what_is_frozen_is_loaded_in_full(kind, tmp_path):
    """A Pretrained init_cfg of a FrozenModel (of a host, which loads by itself, of a host inside, of another module,
    under a prefix), or of a model with a frozen backbone, is an error where it lacks something frozen, and fine where
    it lacks what trains."""
    file = str(tmp_path / 'a.pth')
    init_cfg = dict(type='Pretrained', checkpoint=file, **dict(prefix='neck.') if kind == 'prefix' else {})
    neck = dict(type='mmdet.FPN', in_channels=[8, 8], out_channels=8, num_outs=2)
    if kind == 'host':
        config, lost, new = HOSTS['mmdet-swin'], 'stages.1.blocks.0.attn.w_msa.qkv.weight', 'norm1.weight'
        build = lambda: FrozenModel(base=dict(config, init_cfg=init_cfg), trainable=['norm1'])  # noqa: E731
    elif kind == 'inside':
        config, lost, new = HOSTS['mmdet-swin'], 'stages.1.blocks.0.attn.w_msa.qkv.weight', 'norm1.weight'
        whole = dict(type='SmallModel', backbone=dict(config, init_cfg=init_cfg))
        build = lambda: FrozenModel(base=whole, trainable=['head', 'backbone.norm1'])  # noqa: E731
    elif kind == 'model':
        base = PeftBackbone(base=HOSTS['mmdet-swin'], peft=dict(type='Mona', bottleneck=4))
        lost, new = 'backbone.patch_embed.projection.bias', 'head.bias'

        def build():
            model = BaseModule(init_cfg)
            model.backbone, model.head = base, torch.nn.Linear(2, 2)
            return model
    else:
        lost, new = 'lateral_convs.1.conv.weight', 'fpn_convs.0.conv.weight'
        build = lambda: FrozenModel(base=dict(neck, init_cfg=init_cfg), trainable=['fpn_convs'])  # noqa: E731
    within = 'backbone.' if kind == 'inside' else ''
    state = build().state_dict()
    state = {name: torch.randn_like(t.float()).to(t.dtype) for name, t in state.items() if name.startswith(within)}
    start = 'neck.' if kind == 'prefix' else ''
    for left_out in (new, lost):
        left_out = within + left_out
        torch.save({start + n.removeprefix(within): t for n, t in state.items() if n != left_out}, file)
        model = build()
        if left_out == within + lost:
            with pytest.raises(CheckpointMismatchError, match=f'a.pth .*missing: {lost}'):
                model.init_weights()
        else:
            model.init_weights()
            assert torch.equal(model.state_dict()[within + lost], state[within + lost])


def test_the_tool(tmp_path, tool):
    """tools/convert_checkpoint.py: to mm and back, into a config's backbone with a report, and what it refuses."""
    tensors, _ = golden('swin_mona')
    published = part(tensors, 'state/')
    source, ours, back = (str(tmp_path / name) for name in ('source.pth', 'ours.pth', 'back.safetensors'))
    torch.save({'state_dict': {f'backbone.{name}': t for name, t in published.items()}}, source)
    status, out, err = tool('convert_checkpoint.py', source, ours)
    assert status == 0 and 'names: swin' in out and f'{len(published)} tensors of backbone' in out, err
    assert recognise(n.removeprefix('backbone.') for n in read_checkpoint(ours)['state_dict']) == 'mm'
    assert tool('convert_checkpoint.py', ours, back, '--to', 'published')[0] == 0
    again = safetensors.torch.load_file(back)
    assert all(torch.equal(again[f'backbone.{name}'], t) for name, t in published.items())

    config = str(ROOT / 'configs/demo/demo_mona_shapes.py')
    swin = MODELS.build(dict(load_config(config).model.backbone.base, type='mmdet.SwinTransformer', window_size=7))
    torch.save({'model': to_microsoft(swin.state_dict())}, tmp_path / 'swin.pth')
    fit = str(tmp_path / 'fit.pth')
    status, out, err = tool('convert_checkpoint.py', str(tmp_path / 'swin.pth'), fit, '--config', config)
    assert status == 0 and re.search(r'resized, 8: .*bias_table \(169, 2\) to \(49, 2\)', out), err
    assert re.search(r'missing, 8: norm0.weight', re.sub(r'stages\S+peft\S+ ?', '', out)) or 'norm0.weight' in out
    torch.save({'a.b': torch.ones(1)}, source)
    status, _, err = tool('convert_checkpoint.py', source, str(tmp_path / 'new.pth'))
    assert status == 2 and 'of no known format (a.b' in err
    status, _, err = tool('convert_checkpoint.py', str(tmp_path / 'swin.pth'), ours)
    assert status == 2 and re.search(r'error: .*ours.pth already exists', err)
    status, _, err = tool('convert_checkpoint.py', source, str(tmp_path / 'x.bin'))
    assert status == 2 and 'written as .pth or .safetensors' in err


class Unknown:
    """Something that weights-only loading refuses."""


def test_trusted_files_and_places_that_are_none(tmp_path, tool):
    """--trust-pickle writes tensors of no known format as they are, with what is plain of meta, and no pickle is left;
    what cannot be read or written ends with one line."""
    source, out = str(tmp_path / 'a.pth'), str(tmp_path / 'b.pth')
    meta = dict(epoch=3, dataset_meta=dict(classes=('a', 'b')), hook=Unknown(), seen=[1, 'x'])
    torch.save(dict(state_dict={'neck.conv.weight': torch.ones(2)}, meta=meta, optimizer=Unknown()), source)
    status, _, err = tool('convert_checkpoint.py', source, out, '--trust-pickle')
    assert status == 0, err
    written = torch.load(out, weights_only=True)
    assert written['meta'] == dict(epoch=3, dataset_meta=dict(classes=('a', 'b')), seen=[1, 'x'])
    assert written.keys() == {'state_dict', 'meta'} and list(written['state_dict']) == ['neck.conv.weight']
    (tmp_path / 'bad.npz').write_bytes(b'PK damaged')
    (tmp_path / 'bad.pth').write_bytes(b'damaged')
    torch.save([1], tmp_path / 'list.pth')
    (tmp_path / 'x.delta.safetensors').write_bytes(b'')
    out = str(tmp_path / 'c.pth')
    for arguments, message in [
        ([str(tmp_path / 'bad.npz'), out, '--trust-pickle'], 'bad.npz cannot be read as a checkpoint'),
        ([str(tmp_path / 'bad.npz'), out], 'bad.npz cannot be read as a checkpoint'),
        ([str(tmp_path / 'bad.pth'), out, '--trust-pickle'], 'bad.pth cannot be read as a checkpoint'),
        ([str(tmp_path / 'list.pth'), out, '--trust-pickle'], 'holds a list'),
        ([str(tmp_path / 'x.delta.safetensors'), out], r'is a delta.*tools/delta.py merge CONFIG'),
        ([source, f'{source}/b.pth', '--trust-pickle'], r'b.pth cannot be written: \S+a.pth is, or lies in, a file'),
    ]:
        status, _, err = tool('convert_checkpoint.py', *arguments)
        assert status == 2 and re.search(f'^error: .*{message}', err.splitlines()[-1]), (arguments, err[-300:])
    model = PeftBackbone(base=HOSTS['mmdet-swin'], peft=dict(type='Mona', bottleneck=4))
    with pytest.raises(ConfigError, match='cannot be written'):
        save_delta(model, f'{source}/a.delta.safetensors')


TIMM = {
    # a last map larger than a window: timm shifts no window there, mmdet does
    'swin_tiny_patch4_window7_224': (
        'mmdet-swin', dict(embed_dim=24, depths=(2, 2, 2, 2), num_heads=(1, 2, 3, 4), img_size=448)
    ),
    'vit_tiny_patch16_224': ('mmpretrain-vit', dict(embed_dim=32, depth=3, num_heads=2, mlp_ratio=2, img_size=64)),
    'convnext_tiny': (
        'mmpretrain-convnext', dict(depths=(2, 2, 2, 2), dims=(24, 48, 96, 192), ls_init_value=0.5)
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', TIMM)
def test_outputs_of_timm(name, tmp_path):
    """Where timm is installed: its own models' weights give its own models' last features."""
    timm = pytest.importorskip('timm')
    host, arguments = TIMM[name]
    theirs = timm.create_model(name, **arguments).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    torch.save(theirs.state_dict(), tmp_path / 'timm.pth')
    base = dict(HOSTS[host], init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'timm.pth')))
    model = PeftBackbone(base=base)
    model.init_weights()
    model.eval()
    x = torch.randn(2, 3, *((448, 448) if 'swin' in name else (64, 64)))
    with torch.no_grad():
        expected, actual = theirs.forward_features(x), model(x)[-1]
        if 'swin' in name:  # timm's last norm is the classifier's, ours the output's: compare without
            expected = theirs.layers(theirs.patch_embed(x)).permute(0, 3, 1, 2)
            model.norm3 = torch.nn.Identity()
            actual = model(x)[-1]
        if 'convnext' in name:
            expected = F.layer_norm(
                expected.permute(0, 2, 3, 1), (192,), theirs.head.norm.weight, theirs.head.norm.bias, 1e-6
            ).permute(0, 3, 1, 2)
    assert_near(actual, expected, 5e-5)


def test_only_heads_begin_anew_for_other_classes():
    """A last layer of another number of classes does; the same difference in the backbone, or another width, does
    not."""
    current = {'head.fc.weight': torch.zeros(2, 8), 'backbone.a.weight': torch.zeros(2, 8), 'neck.b': torch.zeros(2, 8)}
    given = {name: torch.zeros(4, 4 if name == 'neck.b' else 8) for name in current}
    assert _class_layers(current, given) == {'head.fc.weight'}


@pytest.mark.slow
def test_your_own_classes_from_a_trained_detector(detector_config, tmp_path, tool):
    """--fine-tune is all it takes to go from four classes to two: every tensor of the trained detector is in the new
    one before its first step, but for the heads' last layers, which the log names; without it, or with a neck of
    another width, the load is refused."""
    cfg = detector_config
    cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1, val_interval=10)
    cfg.model.backbone.base.init_cfg = None
    adapt_to_device(cfg)
    torch.manual_seed(5)
    init_default_scope('mmdet')
    source = MODELS.build(cfg.model)
    stock = {name: t for name, t in source.state_dict().items() if '.peft.' not in name}  # a stock detector's
    torch.save(dict(state_dict=stock, meta={}), tmp_path / 'coco.pth')
    cfg.optim_wrapper.optimizer.lr = 0.0
    cfg.dump(tmp_path / 'config.py')
    arguments = ['train.py', str(tmp_path / 'config.py'), '--work-dir', str(tmp_path / 'work')]
    options = ['--cfg-options', 'classes=[disc,square]']
    status, out, err = tool(*arguments, '--fine-tune', str(tmp_path / 'coco.pth'), *options)
    assert status == 0, err
    anew = {name for name in stock if re.search(r'fc_cls|fc_reg|conv_logits', name)}
    (line,) = re.findall('keep their initial values: (.*_.*)', out + err)
    assert set(line.split(', ')) == anew and len(anew) == 18
    tuned = read_checkpoint(str(tmp_path / 'work/epoch_1.pth'))['state_dict']
    same = {name for name, t in stock.items() if name in tuned and torch.equal(tuned[name], t)}
    assert all('.bn.' in name for name in stock.keys() - anew - same), 'BatchNorm moves without a learning rate'
    status, _, err = tool(*arguments, *options, f'load_from={tmp_path / "coco.pth"}')
    assert status == 2 and 'tools/train.py --fine-tune FILE' in err
    options += ['model.neck.out_channels=16', 'model.rpn_head.in_channels=16']
    status, _, err = tool(*arguments, '--fine-tune', str(tmp_path / 'coco.pth'), *options)
    assert status == 2 and 'other shapes: ' in err and 'fpn_convs' in err
    status, _, err = tool(*arguments, '--fine-tune', 'a.delta.safetensors')
    assert status == 2 and 'merge CONFIG DELTA' in err
