"""mona_mm.merge: a model in memory becomes the stock one with the method in its weights."""

import copy
import pickle

import pytest
import torch
from adapted import HOSTS, adapted, assert_close, image
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.nn.utils import parametrize

import mona_mm
from mona_mm.backbone import FrozenModel, PeftBackbone
from mona_mm.checkpoint.merge import merged_state_dict
from mona_mm.errors import ConfigError, UserError
from mona_mm.spt.sparse import attach_sparse

EVERYWHERE = dict(type='LoRA', rank=4, sites=['q', 'k', 'v', 'proj', 'fc1', 'fc2'])


def stock(host) -> nn.Module:
    with DefaultScope.overwrite_default_scope(HOSTS[host]['type'].split('.')[0]):
        return MODELS.build(dict(HOSTS[host]))


def classes(model) -> dict[str, type]:
    return {path: type(m) for path, m in model.named_modules()}


@pytest.mark.parametrize('host', HOSTS)
@pytest.mark.parametrize('method', ['LoRA', 'single weights', 'BitFit'])
def test_is_the_stock_model(host, method):
    """Outputs, names, classes, attributes and what trains are the stock model's with the merged weights; it is what the
    file-level tool writes; and an optimizer step does to it what it does to the stock model."""
    if method == 'BitFit':
        model = PeftBackbone(HOSTS[host], trainable='bitfit').eval()
    else:
        model = adapted(host, method)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(image(64, 96))
    written = merged_state_dict(model)
    parameters = {name: p for name, p in model.named_parameters() if '.peft.' not in name}
    assert mona_mm.merge(model) is model
    with torch.no_grad():
        assert_close(model(image(64, 96)), expected)
        assert_close(twin(image(64, 96)), expected, 0)
    other = stock(host)
    other.eval()  # some hosts' own returns nothing
    assert classes(model) == classes(other)
    assert list(model.state_dict()) == list(other.state_dict())
    assert all(torch.equal(tensor, written[name]) for name, tensor in model.state_dict().items())
    assert all(p is parameters[name] for name, p in model.named_parameters())
    for (path, a), (_, b) in zip(model.named_modules(), other.named_modules(), strict=True):
        assert vars(a).keys() - {'_is_init'} == vars(b).keys() - {'_is_init'}, path
        assert not a._forward_hooks and not a._forward_pre_hooks
    pickle.loads(pickle.dumps(model))

    other.load_state_dict(
        model.state_dict(), strict=False
    )  # SwinV2 takes tables that it computes out of what it is given
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in other.parameters()]
    for each in (model, other):
        optimizer = torch.optim.SGD(each.parameters(), 0.01)
        sum(out.square().mean() for out in each(image(64, 64))).backward()
        optimizer.step()
    assert_close(model.state_dict().values(), other.state_dict().values())


@pytest.mark.parametrize('host', HOSTS)
def test_low_rank_and_single_weights_together(host):
    """LoRA at every site the host has, and single weights of a linear that LoRA is at as well."""
    sites = [site for site in EVERYWHERE['sites'] if host != 'ConvNeXt' or site.startswith('fc')]
    with DefaultScope.overwrite_default_scope(HOSTS[host]['type'].split('.')[0]):
        model = PeftBackbone(HOSTS[host], dict(EVERYWHERE, sites=sites)).eval()
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and '.peft.' not in path and '.cpb_mlp' not in path:
            attach_sparse(module, [1, 5, 9])
    for p in model.parameters():
        nn.init.normal_(p, 0.5 * (p.dim() == 1), 0.1)
    with torch.no_grad():
        expected = model(image(64, 64))
        mona_mm.merge(model)
        assert_close(model(image(64, 64)), expected)
    assert classes(model) == classes(stock(host))


def test_a_backbone_that_has_two_paths():
    """As in models that keep backbone and neck in a sequence as well: what is added is added once, all of it."""
    backbone = adapted('Swin', 'LoRA')
    sparse = attach_sparse(backbone.stages[0].blocks[0].attn.w_msa.qkv, range(0, 768, 2))
    nn.init.normal_(sparse.values)
    model = nn.ModuleDict(dict(backbone=backbone, encoder=nn.Sequential(backbone, nn.Identity())))
    written = merged_state_dict(model)
    with torch.no_grad():
        expected = backbone(image(64, 64))
        mona_mm.merge(model)
        assert_close(backbone(image(64, 64)), expected)
    assert model.state_dict().keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize('method', ['Mona', 'Adapter', 'AdaptFormer', 'LoRand'])
def test_what_is_no_addition_to_weights_is_refused(method):
    model = adapted('Swin', method)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match=f'{method} cannot be merged'):
        mona_mm.merge(model)
    assert all(map(torch.equal, model.state_dict().values(), before.values()))


def test_within_a_model_and_twice():
    """The backbone of a larger model whose other parts a FrozenModel froze; a second merge finds nothing to do."""
    head = FrozenModel(dict(type='mmdet.ChannelMapper', in_channels=[16, 32], out_channels=8), 'bias')
    model = nn.ModuleDict(dict(backbone=adapted('Swin', 'LoRA'), neck=head))
    mona_mm.merge(mona_mm.merge(model))
    assert all(p.requires_grad for p in model.parameters())
    assert not any('mona_mm' in repr(value) for m in model.modules() for value in vars(m).values())


def test_frozen_weights_in_half_precision_are_single_again():
    model = adapted('Swin', 'LoRA', frozen_dtype='bfloat16')
    written = merged_state_dict(model)
    with torch.no_grad():
        expected = model(image(64, 64))
        mona_mm.merge(model)
        assert_close(model(image(64, 64)), expected, 0.05)
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    assert all(torch.equal(tensor, written[name]) for name, tensor in model.state_dict().items())


def test_a_model_in_half_precision_stays_so():
    model = adapted('Swin', 'LoRA').to(torch.bfloat16)
    mona_mm.merge(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_shared_and_parametrized_weights_are_refused():
    """What is added for one module would be added for another; a whole module in two places is one module."""
    model = adapted('Swin', 'LoRA')
    first, second = model.stages[0].blocks
    second.attn.w_msa.qkv.weight = first.attn.w_msa.qkv.weight
    with pytest.raises(ConfigError, match=r'stages\.0\.blocks\.0.*stages\.0\.blocks\.1.* are one weight'):
        mona_mm.merge(model)
    model = adapted('Swin', 'LoRA')
    model.stages[0].blocks[1] = model.stages[0].blocks[0]
    with torch.no_grad():
        expected = model(image(64, 64))
        mona_mm.merge(model)
        assert_close(model(image(64, 64)), expected)
    model = adapted('Swin', 'LoRA')
    parametrize.register_parametrization(model.stages[0].blocks[0].attn.w_msa.qkv, 'weight', nn.Identity())
    with pytest.raises(ConfigError, match='is parametrized'):
        mona_mm.merge(model)


def test_not_while_somebody_reads():
    model = adapted('Swin', 'LoRA')
    with mona_mm.reading(model), pytest.raises(UserError, match='cannot be changed'):
        mona_mm.merge(model)
    mona_mm.merge(model)


def test_init_weights_of_a_runner_leaves_the_merged_weights():
    """What a Runner calls first would otherwise load the file of init_cfg over them."""
    model = adapted('Swin', 'LoRA')
    model.init_cfg = dict(type='Pretrained', checkpoint='nowhere.pth')
    mona_mm.merge(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapper = mmengine_model(model)
    wrapper.init_weights()
    assert all(map(torch.equal, model.state_dict().values(), before.values()))


def mmengine_model(backbone):
    from mmengine.model import BaseModule

    class Model(BaseModule):
        def __init__(self):
            super().__init__()
            self.backbone = backbone
            self.is_init = True

    return Model()
