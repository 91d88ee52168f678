"""What is checked is what will be loaded: by mmengine's steps and the host's own, for every way to a checkpoint."""

import copy

import pytest
import torch
from conftest import HOSTS, SMALL_SWIN
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel, BaseTTAModel, MMDistributedDataParallel, PretrainedInit
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import Runner, load_checkpoint
from torch import nn

from mona_mm import FrozenModel, PeftBackbone, load_delta, save_delta
from mona_mm.checkpoint.delta import changing
from mona_mm.checkpoint.rehearsal import rehearse
from mona_mm.config.load import fine_tune_from, load_config
from mona_mm.errors import CheckpointMismatchError, ConfigError, UserError

MONA = dict(type='Mona', bottleneck=4)
TABLE = 'backbone.stages.0.blocks.0.attn.w_msa.relative_position_bias_table'


@MODELS.register_module()
class Network(BaseModel):
    """A backbone and a head of so many classes."""

    def __init__(self, backbone, classes=2, data_preprocessor=None):
        super().__init__(data_preprocessor=data_preprocessor)
        self.backbone = MODELS.build(backbone)
        self.head = nn.LazyLinear(classes)
        with torch.no_grad():
            self.head(self.pooled(torch.zeros(1, 3, 64, 64)))

    def pooled(self, x):
        out = self.backbone(x)[-1]
        return out.flatten(2).mean(2) if out.dim() == 4 else out.flatten(1)[:, :32]

    def forward(self, inputs, data_samples=None, mode='tensor'):
        x = torch.stack(inputs) if isinstance(inputs, list) else inputs
        out = self.head(self.pooled(x))
        return dict(loss=out.square().mean()) if mode == 'loss' else [out]


@MODELS.register_module()
class Averaged(BaseTTAModel):
    """The mean of what a model says of several forms of an image."""

    def merge_preds(self, data_samples_list):
        return data_samples_list


@DATASETS.register_module()
class TwoImages(torch.utils.data.Dataset):
    metainfo = dict()

    def __init__(self, size=64):
        self.size = size

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return dict(inputs=torch.full((3, self.size, self.size), float(i)))


class Loaded(Hook):
    """Keeps what the model and its average hold once the Runner has loaded."""

    priority = 'LOWEST'

    def before_train(self, runner):
        self.state = copy.deepcopy(runner.model.state_dict())

    before_test = before_train


def network(peft=MONA, host='small-swin', classes=2, trainable=None, **base) -> BaseModel:
    backbone = dict(SMALL_SWIN if host == 'small-swin' else HOSTS[host], **base)
    if peft or trainable:
        backbone = dict(type='mona_mm.PeftBackbone', base=backbone, peft=peft, trainable=trainable)
    return MODELS.build(dict(type='Network', backbone=backbone, classes=classes))


def randomise(model) -> BaseModel:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.1)
    return model


@pytest.fixture
def start(tmp_path, request):
    """A Runner that has loaded what it is told to: (the Runner, the state dict then)."""

    def run(model, load_from, resume=False, test=False, size=64, hooks=(), check=None, **options):
        loaded = Loaded()
        loader = dict(batch_size=2, num_workers=0, dataset=dict(type='TwoImages', size=size))
        loader['sampler'] = dict(type='DefaultSampler', shuffle=False)
        runner = Runner(
            model=model,
            work_dir=str(tmp_path / 'work'),
            train_dataloader=loader,
            train_cfg=dict(by_epoch=True, max_epochs=2 if resume else 1),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.0)),
            custom_hooks=[dict(type='mona_mm.LoadCheckHook', **(check or {})), *hooks, loaded],
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
            load_from=str(load_from),
            resume=resume,
            experiment_name=f'{request.node.name}-{id(model)}',
            log_level='ERROR',
            **options,
        )
        if test:
            runner._has_loaded = False
            runner.load_or_resume()
            loaded.before_train(runner)
        else:
            runner.train()
        return runner, loaded.state

    return run


def equal(state, expected, names=None) -> bool:
    return all(torch.equal(state[name], expected[name]) for name in names or expected)


@pytest.fixture
def single_process():
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


# Wrappers and names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('names', 'wrapper'),
    [
        pytest.param(names, wrapper, id=f'{wrapper}-{names}', marks=[pytest.mark.slow] * (wrapper in more))
        for names, more in {'plain': ('tta', 'ddp'), 'module.': ('none', 'ddp-tta'), 'flat': ('tta', 'ddp-tta')}.items()
        for wrapper in ('none', 'tta', 'ddp', 'ddp-tta')
    ],
)
def test_wrappers_and_names_of_wrapped_models(wrapper, names, start, tmp_path, single_process):
    """For testing, a good checkpoint loads whole behind every wrapper, with names of a wrapped model, and without the
    `state_dict` around it; one that lacks a tensor is refused behind each, too."""
    source = randomise(network())
    state = {('module.' if names == 'module.' else '') + name: t for name, t in source.state_dict().items()}
    torch.save(state if names == 'flat' else dict(state_dict=state), tmp_path / 'whole.pth')
    del state[next(name for name in state if name.endswith('head.bias'))]
    torch.save(state if names == 'flat' else dict(state_dict=state), tmp_path / 'part.pth')

    def wrapped():
        model = network()
        model = Averaged(model) if 'tta' in wrapper else model
        return MMDistributedDataParallel(model, find_unused_parameters=True) if 'ddp' in wrapper else model

    runner, _ = start(wrapped(), tmp_path / 'whole.pth', test=True)
    inside = runner.model
    while hasattr(inside, 'module'):
        inside = inside.module
    assert equal(inside.state_dict(), source.state_dict())
    untouched = wrapped()
    before = copy.deepcopy(untouched.state_dict())
    with pytest.raises(CheckpointMismatchError, match=r'part\.pth does not fit this Network: missing: head\.bias'):
        start(untouched, tmp_path / 'part.pth', test=True)
    assert equal(untouched.state_dict(), before), 'the refused checkpoint has changed the model'


def test_a_delta_behind_wrappers(start, tmp_path, single_process):
    """A delta loads behind wrappers through the Runner, and through load_delta, as on the model itself."""
    source = network()
    with torch.no_grad():
        for name in changing(source):
            source.state_dict()[name].add_(1)
    save_delta(source, tmp_path / 'a.delta.safetensors')

    moved = changing(source)

    def wrapped():
        model = network(classes=2)
        model.load_state_dict({n: t for n, t in source.state_dict().items() if n not in moved}, strict=False)
        return MMDistributedDataParallel(Averaged(model), find_unused_parameters=True)

    for way in ('runner', 'load_delta', 'load_checkpoint'):
        model = wrapped()
        if way == 'runner':
            start(model, tmp_path / 'a.delta.safetensors', test=True)
        elif way == 'load_delta':
            load_delta(model, tmp_path / 'a.delta.safetensors')
        else:
            load_checkpoint(model, str(tmp_path / 'a.delta.safetensors'))
        assert equal(model.module.module.state_dict(), source.state_dict()), way


def test_load_from_of_a_stock_model_with_names_of_a_wrapped_one(start, tmp_path):
    """The method's parameters may be missing, and nothing else."""
    source = randomise(network(peft=None))
    torch.save(dict(state_dict={f'module.{n}': t for n, t in source.state_dict().items()}), tmp_path / 'a.pth')
    _, state = start(network(), tmp_path / 'a.pth')
    assert equal(state, source.state_dict())
    with pytest.raises(CheckpointMismatchError, match=r'missing: backbone\.stages\.0\.blocks\.0\.peft'):
        start(network(), tmp_path / 'a.pth', test=True)


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_resuming_and_averages(prefix, start, tmp_path):
    """A run with an average of the weights starts from a stock model, is resumed exactly, and its checkpoint is one to
    start from; a checkpoint to resume with names of a wrapped model is loaded whole."""
    ema = dict(type='EMAHook', momentum=0.5)
    source = randomise(network(peft=None))
    torch.save(dict(state_dict=source.state_dict()), tmp_path / 'stock.pth')
    _, state = start(network(), tmp_path / 'stock.pth', hooks=[ema])
    assert equal(state, source.state_dict())
    checkpoint = torch.load(tmp_path / 'work/epoch_1.pth', weights_only=False)
    raw = {name: t.clone() for name, t in checkpoint['ema_state_dict'].items() if name.startswith('module.')}
    start(network(), tmp_path / 'work/epoch_1.pth', hooks=[ema])
    _, state = start(network(), tmp_path / 'work/epoch_1.pth', resume=True, hooks=[ema])
    assert equal(state, {name.removeprefix('module.'): t for name, t in raw.items()})
    checkpoint['state_dict'] = {prefix + name: t for name, t in checkpoint['state_dict'].items()}
    torch.save(checkpoint, tmp_path / 'named.pth')
    _, state = start(network(), tmp_path / 'named.pth', resume=True)
    assert equal(state, {name.removeprefix(prefix): t for name, t in checkpoint['state_dict'].items()})


def test_nothing_to_resume(start, tmp_path):
    """Weights alone, or those of a merged model, hold no state of a run: mmengine would end in a KeyError."""
    state = network().state_dict()
    for name, checkpoint in dict(
        flat=state, weights=dict(state_dict=state), merged=dict(state_dict=state, meta={})
    ).items():
        torch.save(checkpoint, tmp_path / f'{name}.pth')
        with pytest.raises(CheckpointMismatchError, match=rf'{name}\.pth holds no state of a run .*load_from='):
            start(network(), tmp_path / f'{name}.pth', resume=True)


def test_strict_and_other_names(tmp_path, start):
    """What a caller of the Runner says: with strict=True nothing may be missing, and names are those after its
    `revise_keys`."""
    source = randomise(network(peft=None))
    torch.save(dict(state_dict={f'student.{n}': t for n, t in source.state_dict().items()}), tmp_path / 'student.pth')
    whole = randomise(network())
    torch.save(dict(state_dict=whole.state_dict()), tmp_path / 'whole.pth')
    runner, _ = start(network(), tmp_path / 'whole.pth')
    with pytest.raises(CheckpointMismatchError, match='unexpected: student'):
        runner.load_checkpoint(str(tmp_path / 'student.pth'))
    runner.load_checkpoint(str(tmp_path / 'student.pth'), revise_keys=[(r'^student\.', '')])
    assert equal(runner.model.state_dict(), source.state_dict())
    with pytest.raises(CheckpointMismatchError, match=r'missing: backbone\.stages\.0\.blocks\.0\.peft'):
        runner.load_checkpoint(str(tmp_path / 'student.pth'), strict=True, revise_keys=[(r'^student\.', '')])
    runner.load_checkpoint(str(tmp_path / 'whole.pth'), strict=True)
    # and the check is over: what is loaded otherwise is loaded as mmengine does
    load_checkpoint(runner.model, str(tmp_path / 'student.pth'), revise_keys=[(r'^student\.head', 'head')])
    assert torch.equal(runner.model.head.weight, source.head.weight)


@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('ema', [False, True], ids=['plain', 'ema'])
def test_fine_tuning_for_other_classes(prefix, ema, start, tmp_path):
    """`--fine-tune`: the last layers alone begin anew, whatever the names begin with, in the average, too."""
    source = randomise(network(peft=None, classes=5))
    torch.save(dict(state_dict={prefix + n: t for n, t in source.state_dict().items()}), tmp_path / 'five.pth')
    hooks = [dict(type='EMAHook')] if ema else []
    model = network()
    _, state = start(model, tmp_path / 'five.pth', check=dict(other_classes=True), hooks=hooks)
    assert equal(state, source.state_dict(), [n for n in source.state_dict() if n.startswith('backbone.')])
    assert state['head.weight'].shape == (2, 48)
    with pytest.raises(CheckpointMismatchError, match=r'head\.weight \(5, 48\) instead of \(2, 48\).*--fine-tune'):
        start(network(), tmp_path / 'five.pth', hooks=hooks)


@pytest.mark.parametrize('hooks', [None, [], [dict(type='IterationSeedHook')], [dict(type='mona_mm.LoadCheckHook')]])
def test_fine_tune_from_a_config(hooks):
    """The option is in the config that the Runner is built from, with the hook there before or without one."""
    cfg = Config(dict(model=dict()) if hooks is None else dict(custom_hooks=copy.deepcopy(hooks)))
    fine_tune_from(cfg, 'five.pth')
    assert cfg.load_from == 'five.pth'
    checks = [hook for hook in cfg.custom_hooks if 'LoadCheckHook' in hook['type']]
    assert checks == [dict(type='mona_mm.LoadCheckHook', other_classes=True)]
    assert len(cfg.custom_hooks) == len([h for h in hooks or [] if 'LoadCheck' not in h['type']]) + 1


# Tables of positions ----------------------------------------------------------------------------------------------

SIZES = {
    'vit': ('mmpretrain-vit', dict(img_size=64), dict(img_size=96)),
    'vit-smaller': ('mmpretrain-vit', dict(img_size=96), dict(img_size=64)),
    'swin-absolute': (
        'mmpretrain-swin',
        dict(img_size=64, use_abs_pos_embed=True),
        dict(img_size=96, use_abs_pos_embed=True),
    ),
    'swinv2': ('mmpretrain-swinv2', dict(window_size=4), dict(window_size=6)),
}


@pytest.mark.parametrize('case', SIZES)
def test_whole_checkpoints_of_another_size(case, start, tmp_path):
    """Where the host resizes its tables, a checkpoint of another image or window size loads as into the stock model,
    to start from and to test, and one that the host cannot resize is refused."""
    host, old, new = SIZES[case]
    source = randomise(network(host=host, **old))
    torch.save(dict(state_dict=source.state_dict()), tmp_path / 'whole.pth')
    expected = network(host=host, **new)
    expected.load_state_dict(source.state_dict(), strict=False)
    for test in (False, True):
        _, state = start(network(host=host, **new), tmp_path / 'whole.pth', test=test)
        assert equal(state, expected.state_dict()), test
    wrong = source.state_dict()
    name = 'backbone.pos_embed' if 'vit' in case else 'backbone.patch_embed.projection.weight'
    wrong[name] = wrong[name][..., :-1]
    torch.save(dict(state_dict=wrong), tmp_path / 'wrong.pth')
    with pytest.raises(CheckpointMismatchError, match=rf'{name} \(.*\) instead of'):
        start(network(host=host, **new), tmp_path / 'wrong.pth')


@pytest.mark.parametrize('host', ['mmdet-swin', 'mmseg-swin'])
def test_tables_that_the_host_does_not_resize(host, start, tmp_path):
    """mmdet's and mmseg's Swin resize only what their init_cfg names: from load_from, the table would stay random."""
    source = randomise(network(host=host))
    torch.save(dict(state_dict=source.state_dict()), tmp_path / 'whole.pth')
    with pytest.raises(CheckpointMismatchError, match=rf'{TABLE} \(169, 1\) instead of \(81, 1\)'):
        start(network(host=host, window_size=5), tmp_path / 'whole.pth')


def test_where_the_host_itself_fails(start, tmp_path, monkeypatch):
    """The host's own error, which is what stock mmengine ends in, is in ours."""
    source = randomise(network(host='mmpretrain-swin', window_size=4))
    torch.save(dict(state_dict=source.state_dict()), tmp_path / 'whole.pth')

    def fails(*args):
        raise NotImplementedError('interp2d has been removed in SciPy 1.14.0.')

    monkeypatch.setattr('mmpretrain.models.backbones.swin_transformer.resize_relative_position_bias_table', fails)
    with pytest.raises(CheckpointMismatchError, match='relative_position_bias_table.*interp2d has been removed'):
        start(network(host='mmpretrain-swin', window_size=6), tmp_path / 'whole.pth')


@pytest.mark.parametrize('trainable', ['full', None], ids=['trained', 'frozen'])
@pytest.mark.parametrize('case', ['vit', 'swin-absolute', 'swinv2'])
def test_deltas_on_another_size(case, trainable, tmp_path):
    """A delta on a model of another image or window size is what the whole checkpoint is: tables that it holds are
    resized by the host, and those of its frozen base may have another size, as the base's have; another base is
    refused all the same."""
    host, old, new = SIZES[case]
    peft = None if trainable else MONA
    source = network(peft, host, trainable=trainable, **old)
    base = copy.deepcopy(source.state_dict())
    with torch.no_grad():
        for name in changing(source):
            if source.state_dict()[name].is_floating_point():
                source.state_dict()[name].add_(torch.randn(source.state_dict()[name].shape) * 0.1)
    save_delta(source, tmp_path / 'a.delta.safetensors')
    model, expected = (network(peft, host, trainable=trainable, **new) for _ in range(2))
    model.load_state_dict(base, strict=False)
    expected.load_state_dict(source.state_dict(), strict=False)
    load_delta(model, tmp_path / 'a.delta.safetensors')
    assert equal(model.state_dict(), expected.state_dict())
    if trainable is None:
        other = network(peft, host, **new)
        with torch.no_grad():
            other.load_state_dict(base, strict=False)
            next(t for n, t in other.state_dict().items() if n.endswith('qkv.weight')).add_(0.1)
        with pytest.raises(CheckpointMismatchError, match='trained on another frozen base'):
            load_delta(other, tmp_path / 'a.delta.safetensors')
        same_size = network(peft, host, **old)
        same_size.load_state_dict(base, strict=False)
        table = next((t for n, t in same_size.state_dict().items() if n.endswith('pos_embed')), None)
        if table is not None:
            with torch.no_grad():
                table.add_(0.1)
            with pytest.raises(CheckpointMismatchError, match='trained on another frozen base'):
                load_delta(same_size, tmp_path / 'a.delta.safetensors')


def test_a_rehearsal_is_the_loading():
    """What a rehearsal says would be written is what loading writes, and the model keeps its values meanwhile."""
    source, model = randomise(network(host='mmpretrain-vit', img_size=96)), network(host='mmpretrain-vit')
    given = {name: t for name, t in source.state_dict().items() if 'head.bias' not in name}
    given['backbone.what'] = torch.zeros(1)
    before = copy.deepcopy(model.state_dict())
    found = rehearse(model, given)
    assert equal(model.state_dict(), before)
    assert (found.missing, found.unexpected, found.reshaped) == (['head.bias'], ['backbone.what'], {})
    model.load_state_dict(given, strict=False)
    assert found.values.keys() == model.state_dict().keys() - {'head.bias'}
    assert equal(model.state_dict(), found.values)


# init_cfg ---------------------------------------------------------------------------------------------------------

READS_ITSELF = ('mmdet-swin', 'mmseg-swin', 'mmdet-pvtv2')


def backbone_of(host, init_cfg, **kwargs) -> nn.Module:
    return PeftBackbone(base=dict(HOSTS[host], init_cfg=init_cfg), peft=MONA, **kwargs)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """By host a file with a backbone's random weights, alone and within a model."""
    folder, found = tmp_path_factory.mktemp('files'), {}
    for host in ('mmdet-swin', 'mmseg-swin', 'mmdet-pvtv2', 'mmpretrain-vit', 'mmpretrain-convnext'):
        state = randomise(MODELS.build(HOSTS[host])).state_dict()
        torch.save(state, folder / f'{host}.pth')
        torch.save({f'encoder.{name}': t for name, t in state.items()}, folder / f'{host}-in.pth')
        found[host] = str(folder / f'{host}.pth'), str(folder / f'{host}-in.pth'), state
    return found


FORMS = {
    'type': lambda file, inside: dict(type='Pretrained', checkpoint=file),
    'class': lambda file, inside: dict(type=PretrainedInit, checkpoint=file),
    'list': lambda file, inside: [
        dict(type='TruncNormal', layer='Linear', std=0.02),
        dict(type='Pretrained', checkpoint=file),
    ],
    'map_location': lambda file, inside: dict(type='Pretrained', checkpoint=file, map_location='cpu'),
    'prefix': lambda file, inside: dict(type='Pretrained', checkpoint=inside, prefix='encoder.'),
    'without-type': lambda file, inside: dict(checkpoint=file),
}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('host', ['mmdet-swin', 'mmseg-swin', 'mmdet-pvtv2', 'mmpretrain-vit', 'mmpretrain-convnext'])
def test_forms_of_init_cfg(host, form, files):
    """Every form that mmengine or the host takes loads the file; one without a type is for those that read the file
    themselves (PVT's configs in mmdet have it so), and with others a clear error, as stock is an unclear one."""
    file, inside, state = files[host]
    for ours in ('PeftBackbone', 'FrozenModel'):
        base = dict(HOSTS[host], init_cfg=FORMS[form](file, inside))

        def initialised(ours=ours, base=base):
            model = PeftBackbone(base, MONA) if ours == 'PeftBackbone' else FrozenModel(base, 'fixed')
            model.init_weights()
            return model

        if form == 'without-type' and host not in READS_ITSELF:
            with pytest.raises(ConfigError, match=r'init_cfg=.*a dict with a type'):
                initialised()
        else:
            assert equal(initialised().state_dict(), state), ours


@pytest.mark.parametrize('init_cfg', [{}, [], 'x', 3, ['x'], [{}], dict(type='Pretrained'), dict(type='Nothing'),
                                      dict(type='Pretrained', checkpoint=None), dict(type='Xavier', layer='Linear'),
                                      dict(type='Pretrained', checkpoint=5), dict(prefix='a'), dict(type=None),
                                      dict(type='Pretrained', checkpoint='nowhere.pth')], ids=str)  # fmt: skip
@pytest.mark.parametrize(
    'host', ['mmdet-swin', 'mmdet-pvtv2', 'mmpretrain-vit', 'mmpretrain-swin', 'mmpretrain-convnext']
)
def test_init_cfg_that_is_none(host, init_cfg):
    """Whatever else an init_cfg is: where the stock backbone takes it, so do we; where it fails, one error of ours."""

    def failure(build):
        try:
            build().init_weights()
        except Exception as error:
            return error

    stock = failure(lambda: MODELS.build(dict(HOSTS[host], init_cfg=copy.deepcopy(init_cfg))))
    ours = failure(lambda: backbone_of(host, copy.deepcopy(init_cfg)))
    assert (stock is None) == (ours is None), (stock, ours)
    assert ours is None or (isinstance(ours, UserError) and 'init_cfg' in str(ours)), repr(ours)
    if init_cfg in ('x', 3):  # what no host takes is refused before anything is built
        with pytest.raises(ConfigError, match='init_cfg'):
            backbone_of(host, init_cfg)


def test_a_stock_config_of_pvt():
    """mmdet's own config, PeftBackbone around its backbone: the address in its init_cfg is what is fetched."""
    import mmdet

    cfg = load_config(f'{mmdet.__path__[0]}/.mim/configs/pvt/retinanet_pvtv2-b0_fpn_1x_coco.py')
    assert 'type' not in cfg.model.backbone.init_cfg
    cfg.model.backbone = dict(type='mona_mm.PeftBackbone', base=cfg.model.backbone, peft=MONA)
    init_default_scope('mmdet')
    backbone = MODELS.build(cfg.model.backbone)
    from mona_mm.checkpoint.pretrained import pretrained_file

    assert pretrained_file(backbone)['file'].endswith('pvt_v2_b0.pth')


# Merged models train on -------------------------------------------------------------------------------------------


def test_a_merged_model_trains_on(detector_config, tmp_path, tool):
    """LoRA merged into a detector whose base came from a file that only mona_mm reads: the config that merging writes
    trains in stock mmdet from the merged weights, with nothing of mona_mm and no other file in it."""
    cfg = detector_config
    base = dict(cfg.model.backbone.base)
    base.pop('init_cfg', None)
    init_default_scope('mmdet')
    pretrained = {f'encoder.{n}': t for n, t in randomise(MODELS.build(base)).state_dict().items()}
    torch.save(pretrained, tmp_path / 'base.pth')
    cfg.model.backbone.base.init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth'), prefix='encoder.')
    cfg.model.backbone.peft = dict(type='LoRA', rank=2)
    cfg.dump(tmp_path / 'config.py')
    model = MODELS.build(cfg.model)
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.01)
    delta, merged, written = (str(tmp_path / name) for name in ('a.delta.safetensors', 'merged.pth', 'merged.py'))
    save_delta(model, delta)
    status, _, err = tool('delta.py', 'merge', str(tmp_path / 'config.py'), delta, merged, '--config-out', written)
    assert status == 0, err
    (tmp_path / 'base.pth').unlink()
    stock = load_config(written)
    assert 'mona_mm' not in stock.pretty_text and 'base.pth' not in stock.pretty_text
    assert stock.load_from == merged
    stock.merge_from_dict(
        {
            'train_cfg': dict(_delete_=True, type='IterBasedTrainLoop', max_iters=1, val_interval=5),
            'param_scheduler': None,
            'optim_wrapper': dict(_delete_=True, type='OptimWrapper', optimizer=dict(type='SGD', lr=0.0)),
            'work_dir': str(tmp_path / 'stock'),
        }
    )
    for node in (stock.model.backbone, stock.model.neck):
        assert 'Pretrained' not in str(node.get('init_cfg'))
    runner = Runner.from_cfg(stock)
    assert type(runner.model.backbone).__module__ == 'mmdet.models.backbones.swin'
    runner.train()
    expected = torch.load(merged, weights_only=True)['state_dict']
    trained = {
        name: t for name, t in runner.model.state_dict().items() if 'running' not in name and 'num_b' not in name
    }
    assert equal(trained, expected, trained)


@pytest.mark.parametrize(
    'init_cfg',
    [
        dict(type='Pretrained', checkpoint='a.pth'),
        dict(checkpoint='a.pth'),
        [dict(type='Kaiming', layer='Conv2d'), dict(type='Pretrained', checkpoint='a.pth')],
        dict(type=PretrainedInit, checkpoint='a.pth'),
    ],
    ids=['type', 'without-type', 'list', 'class'],
)
@pytest.mark.parametrize('merging', ['stock', 'self-contained'])
def test_merged_configs_name_no_pretrained_file(init_cfg, merging):
    """Of every init_cfg only what names a file goes; what else initialises stays."""
    from mona_mm.checkpoint.merge import self_contained_config, stock_config

    base = dict(type='SwinTransformer', init_cfg=init_cfg)
    neck = dict(type='FPN', init_cfg=dict(type='Xavier', layer='Conv2d'))
    model = dict(
        type='D', backbone=dict(type='mona_mm.PeftBackbone', base=base, peft=None), neck=neck, pretrained='b.pth'
    )
    cfg = (stock_config if merging == 'stock' else self_contained_config)(Config(dict(model=model)))
    backbone = cfg.model.backbone if merging == 'stock' else cfg.model.backbone.base
    kept = [dict(type='Kaiming', layer='Conv2d')] if isinstance(init_cfg, list) else None
    assert backbone.init_cfg == kept
    assert cfg.model.neck.init_cfg == dict(type='Xavier', layer='Conv2d') and cfg.model.pretrained is None


def test_merged_configs_forget_pretrained_files_in_tuples():
    """Heads may be a tuple, as pure-Python configs write them."""
    from mona_mm.checkpoint.merge import self_contained_config, stock_config

    head = dict(type='H', init_cfg=(dict(type='Xavier', layer='Conv2d'), dict(type='Pretrained', checkpoint='a.pth')))
    model = dict(type='D', decode_head=(head, dict(type='H', init_cfg=dict(type='Pretrained', checkpoint='b.pth'))))
    for merged in (stock_config, self_contained_config):
        cfg = merged(Config(copy.deepcopy(dict(model=model))))
        first, second = cfg.model.decode_head
        assert first.init_cfg == [dict(type='Xavier', layer='Conv2d')] and second.init_cfg is None
