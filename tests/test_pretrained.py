"""The pretrained base loads whole or not at all, whatever names its file has."""

import re
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from conftest import HOSTS, VIT, golden, golden_swin_config, part
from helpers import assert_near, to_microsoft
from mmengine.registry import MODELS

from mona_mm import PeftBackbone
from mona_mm.checkpoint import convert_state_dict
from mona_mm.errors import CheckpointMismatchError, MissingFileError


def stock(host: str) -> torch.nn.Module:
    model = MODELS.build(HOSTS[host])
    model.init_weights()
    return model


def with_file(host: str, file, **kwargs) -> torch.nn.Module:
    base = dict(HOSTS[host], init_cfg=dict(type='Pretrained', checkpoint=str(file)))
    return PeftBackbone(base=base, peft=dict(type='Mona', bottleneck=8), **kwargs)


def base_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: t for name, t in model.state_dict().items() if '.peft.' not in name}


@pytest.mark.parametrize('host', ['mmdet-swin', 'mmseg-swin', 'mmpretrain-swin'])
def test_microsoft_swin_loads_into_every_swin(host, tmp_path):
    """`{'model': ...}` in Microsoft's names gives the weights it was made of, whichever library the host is from."""
    source = stock(host)
    with torch.no_grad():
        for p in source.parameters():
            p.add_(torch.randn_like(p))
    torch.save({'model': to_microsoft(source.state_dict())}, tmp_path / 'swin_22k.pth')
    model = with_file(host, tmp_path / 'swin_22k.pth')
    model.init_weights()
    expected = source.state_dict()
    for name, tensor in base_state(model).items():
        if not re.match(r'norm\d', name):
            assert torch.equal(tensor, expected[name]), name
    assert all((getattr(model, f'norm{i}').weight == 1).all() for i in range(4))


def test_microsoft_file_of_the_golden_base_gives_golden_outputs(tmp_path):
    """The published base and adapter, through a Pretrained init_cfg, give the published outputs."""
    tensors, metadata = golden('swin_mona')
    torch.save({'model': part(tensors, 'state/')}, tmp_path / 'published.pth')
    model = PeftBackbone(
        base=dict(
            type='mmdet.SwinTransformer',
            init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'published.pth')),
            **golden_swin_config(metadata),
        ),
    )
    with pytest.raises(CheckpointMismatchError, match=r'unexpected: stages\.0\.blocks\.0\.peft\.post_attn'):
        model.init_weights()  # the file holds a Mona, the model has none
    base_only = {k: v for k, v in part(tensors, 'state/').items() if 'my_module' not in k}
    torch.save({'model': base_only}, tmp_path / 'published.pth')
    model.init_weights()
    expected = convert_state_dict(base_only)
    assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items() if name in expected)
    assert set(expected) <= set(model.state_dict())


@pytest.mark.parametrize('host', sorted(HOSTS))
@pytest.mark.parametrize('wrapper', ['plain', 'detector', 'data-parallel'])
def test_native_names_load(host, wrapper, tmp_path):
    """A backbone's own names, alone, inside a detector's checkpoint, and with DataParallel's prefix."""
    source = stock(host)
    state = source.state_dict()
    if wrapper == 'detector':
        state = {'state_dict': {**{f'backbone.{k}': v for k, v in state.items()}, 'bbox_head.w': torch.ones(1)}}
    elif wrapper == 'data-parallel':
        state = {'state_dict': {f'module.{k}': v for k, v in state.items()}, 'meta': dict(epoch=1)}
    torch.save(state, tmp_path / 'base.pth')
    model = with_file(host, tmp_path / 'base.pth')
    model.init_weights()
    assert all(torch.equal(t, source.state_dict()[name]) for name, t in base_state(model).items())


def test_window_size_is_interpolated(tmp_path):
    """Tables of a window of 7 are resized for a window of 12; everything else loads as it is."""
    source = stock('mmdet-swin')
    torch.save(source.state_dict(), tmp_path / 'w7.pth')
    base = dict(
        HOSTS['mmdet-swin'], window_size=12, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'w7.pth'))
    )
    model = PeftBackbone(base=base, peft=dict(type='Mona'))
    model.init_weights()
    name = 'stages.1.blocks.0.attn.w_msa.relative_position_bias_table'
    old, new = source.state_dict()[name], model.state_dict()[name]
    assert new.shape == (23 * 23, 2)
    assert_near(new.view(23, 23, 2)[11, 11], old.view(13, 13, 2)[6, 6])  # the centre is the centre
    size = dict(size=(23, 23), mode='bicubic')
    expected = torch.nn.functional.interpolate(old.T.reshape(1, 2, 13, 13), **size)[0]
    assert_near(new.T.view(2, 23, 23), expected)
    index = model.state_dict()[name.replace('bias_table', 'index')]
    assert index.shape == (144, 144) and index.max() == 23 * 23 - 1


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(embed_dims=32, num_heads=(1, 2, 4, 8)), r'other shapes: patch_embed\.projection\.weight \(32, 3, 4, 4\)'),
        (dict(depths=(2, 1, 2, 1)), r'unexpected: stages\.2\.blocks\.1\.'),
        (dict(depths=(1, 1, 1, 1)), r'missing: stages\.0\.blocks\.1\..* and \d+ more'),
    ],
)
def test_another_architecture_is_refused(change, message, tmp_path):
    """Width or depth of another Swin: one error names the file and the first keys that do not fit."""
    other = MODELS.build({**HOSTS['mmdet-swin'], **change})
    torch.save({'model': to_microsoft(other.state_dict())}, tmp_path / 'other.pth')
    model = with_file('mmdet-swin', tmp_path / 'other.pth')
    with pytest.raises(CheckpointMismatchError, match=rf'(?s)other\.pth.*SwinTransformer.*{message}'):
        model.init_weights()


def test_a_vit_is_not_a_swin(tmp_path):
    vit = MODELS.build(dict(type='mmpretrain.VisionTransformer', arch=VIT, img_size=64))
    torch.save(vit.state_dict(), tmp_path / 'vit.pth')
    with pytest.raises(CheckpointMismatchError, match='missing: .*unexpected: cls_token'):
        with_file('mmdet-swin', tmp_path / 'vit.pth').init_weights()


def test_vit_of_another_image_size_and_with_a_class_token(tmp_path):
    """What the stock ViT accepts: a position embedding of another size, and a class token that it has no use for."""
    for host, size in [('mmpretrain-vit', 96), ('mmpretrain-vit-no-cls', 64)]:
        source = MODELS.build(dict(HOSTS['mmpretrain-vit'], img_size=size))
        torch.save(source.state_dict(), tmp_path / 'vit.pth')
        model, stock_model = with_file(host, tmp_path / 'vit.pth'), MODELS.build(HOSTS[host])
        model.init_weights()
        stock_model.load_state_dict(source.state_dict(), strict=False)
        assert all(torch.equal(t, stock_model.state_dict()[name]) for name, t in base_state(model).items())


def test_legacy_classifier_and_prefix(tmp_path):
    """An old mmpretrain file (final `norm`, attention masks), and an init_cfg with a prefix."""
    for host in ('mmdet-swin', 'mmpretrain-swin'):
        state = stock(host).state_dict()
        legacy = {
            name.replace('norm3.', 'norm.') if name.startswith('norm3.') else name: t for name, t in state.items()
        }
        legacy['stages.0.blocks.1.attn.w_msa.attn_mask'] = torch.zeros(4, 49, 49)
        torch.save({'state_dict': {f'momentum.{name}': t for name, t in legacy.items()}}, tmp_path / 'legacy.pth')
        init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'legacy.pth'), prefix='momentum.')
        model = PeftBackbone(base=dict(HOSTS[host], init_cfg=init_cfg), peft=dict(type='Mona', bottleneck=8))
        model.init_weights()
        loaded = {n: t for n, t in base_state(model).items() if not n.startswith('norm3.')}
        assert all(torch.equal(t, state[name]) for name, t in loaded.items())


def test_files_that_are_no_weights_are_refused(tmp_path, monkeypatch):
    """Text, half a file, and a pickle that runs code, from the disk and from the download cache: none is executed."""
    torch.save(stock('mmdet-swin').state_dict(), tmp_path / 'whole.pth')
    (tmp_path / 'text.pth').write_text('not found')
    (tmp_path / 'half.pth').write_bytes((tmp_path / 'whole.pth').read_bytes()[:50_000])

    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / 'executed',)

    torch.save({'state_dict': Attack()}, tmp_path / 'attack.pth')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    (tmp_path / 'hub/checkpoints').mkdir(parents=True)
    torch.save({'state_dict': Attack()}, tmp_path / 'hub/checkpoints/attack.pth')
    for file in ('text.pth', 'half.pth', 'attack.pth'):
        with pytest.raises(CheckpointMismatchError, match=f'{file} cannot be read as a checkpoint'):
            with_file('mmdet-swin', tmp_path / file).init_weights()
    with pytest.raises(CheckpointMismatchError, match='cannot be read as a checkpoint'):
        with_file('mmdet-swin', 'https://example.invalid/attack.pth').init_weights()
    assert not (tmp_path / 'executed').exists()


def test_missing_file_and_no_network(tmp_path, monkeypatch):
    """A path that is not there and an address that cannot be reached: where to put the file, how to point to it."""
    with pytest.raises(MissingFileError, match=r'no checkpoint .*nowhere\.pth.*init_cfg\.checkpoint='):
        with_file('mmdet-swin', tmp_path / 'nowhere.pth').init_weights()

    def no_network(*args, **kwargs):
        raise URLError('Name or service not known')

    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr('torch.hub.download_url_to_file', no_network)
    model = with_file('mmdet-swin', 'https://example.invalid/swin_base.pth')
    with pytest.raises(MissingFileError, match=r'(?s)Cannot download .*hub.checkpoints.swin_base\.pth.*--cfg-options'):
        model.init_weights()
    # ... and put there, it is found
    (tmp_path / 'hub/checkpoints').mkdir(parents=True, exist_ok=True)
    torch.save(stock('mmdet-swin').state_dict(), tmp_path / 'hub/checkpoints/swin_base.pth')
    model.init_weights()
