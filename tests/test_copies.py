"""Copies of a model: averages and teachers keep the frozen part bit for bit, and their deltas load on the base."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from helpers import pairwise
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseAveragedModel, BaseModel, ExponentialMovingAverage
from mmengine.registry import DATASETS, HOOKS, MODELS
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import mona_mm
from mona_mm import load_delta, save_delta
from mona_mm.checkpoint.delta import changing
from mona_mm.checkpoint.delta_file import read_delta
from mona_mm.commands.cli import build_runner
from mona_mm.errors import CheckpointMismatchError, FreezeError
from mona_mm.frozen.averages import differing_frozen, frozen_tensors
from mona_mm.frozen.copies import moving_copies
from mona_mm.frozen.count import count_trainable

UPDATES = 40
SWIN = dict(type='mmdet.SwinTransformer', embed_dims=8, depths=(1, 1), num_heads=(1, 2), window_size=4, strides=(4, 2))
SWIN |= dict(out_indices=(0, 1))


@MODELS.register_module()
class CopiedModel(BaseModel):
    """A backbone, a frozen neck with a BatchNorm, and a head."""

    def __init__(self, backbone, init_cfg=None):
        super().__init__(init_cfg=init_cfg)
        self.backbone = MODELS.build(backbone)
        self.neck = mona_mm.FrozenModel(base=dict(type='FrozenNeck'), trainable='none')
        self.head = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1))

    def forward(self, inputs, mode='tensor'):
        x = torch.stack(inputs) if isinstance(inputs, list) else inputs
        out = self.head(self.neck(self.backbone(x)[-1]))
        return dict(loss=out.square().mean()) if mode == 'loss' else out


@MODELS.register_module()
class FrozenNeck(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8))
        with torch.random.fork_rng():
            torch.manual_seed(7)
            for tensor in self.state_dict().values():
                if tensor.is_floating_point():
                    nn.init.uniform_(tensor, 0.1, 0.3)


@MODELS.register_module()
class StudentAndTeacher(BaseModel):
    """As mmdet's semi-supervised detectors are made: two of one config, of which the teacher is frozen afterwards."""

    def __init__(self, detector, init_cfg=None):
        super().__init__(init_cfg=init_cfg)
        self.student = MODELS.build(detector)
        self.teacher = MODELS.build(detector)
        self.teacher.eval().requires_grad_(False)

    def forward(self, inputs, mode='tensor'):
        if mode != 'loss':
            return self.teacher(inputs, mode)
        with torch.no_grad():
            target = self.teacher(inputs)
        return dict(loss=(self.student(inputs) - target + 1).square().mean())


@MODELS.register_module()
class MomentumEncoder(BaseModel):
    """As mmpretrain's MoCo is made: an averaging object of backbone and head is a part of the model."""

    def __init__(self, backbone, init_cfg=None):
        super().__init__(init_cfg=init_cfg)
        self.backbone = MODELS.build(backbone)
        self.neck = nn.Sequential(nn.Conv2d(16, 4, 1), nn.BatchNorm2d(4))
        self.encoder_k = RoundingAverage(nn.Sequential(self.backbone, self.neck), momentum=0.3)

    def forward(self, inputs, mode='tensor'):
        x = torch.stack(inputs) if isinstance(inputs, list) else inputs
        if mode == 'loss':
            self.encoder_k.update_parameters(nn.Sequential(self.backbone, self.neck))
        backbone, neck = self.encoder_k.module
        with torch.no_grad():
            key = neck(backbone(x)[-1])
        out = self.neck(self.backbone(x)[-1])
        return dict(loss=(out - key + 1).square().mean()) if mode == 'loss' else out


class RoundingAverage(ExponentialMovingAverage):
    """Averages by the formula of mmdet's ExpMomentumEMA."""

    def avg_func(self, averaged_param, source_param, steps):
        averaged_param.mul_(1 - self.momentum).add_(source_param, alpha=self.momentum)


@MODELS.register_module()
class OwnAverage(BaseAveragedModel):
    """A class with an update of its own."""

    def update_parameters(self, model):
        blend(self.module, model)
        self.steps += 1


@MODELS.register_module()
class ForeignAverage(nn.Module):
    """What EMAHook needs of an averaging class, and nothing of mmengine's."""

    update_buffers = True

    def __init__(self, model):
        super().__init__()
        self.module = copy.deepcopy(model).requires_grad_(False)

    def update_parameters(self, model):
        blend(self.module, model)


@HOOKS.register_module()
class HookWithACopy(Hook):
    """Averages by hand, in a copy that it makes late, and holds a teacher of other weights beside it."""

    def before_train(self, runner):
        self.teacher = copy.deepcopy(runner.model)
        with torch.no_grad():
            for tensor in self.teacher.parameters():
                tensor.add_(1)
        self.taught = copy.deepcopy(self.teacher.state_dict())
        self.copies = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if not self.copies:
            self.copies.append(copy.deepcopy(runner.model))
        else:
            blend(self.copies[0], runner.model)


def blend(averaged, model):
    for mine, source in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True):
        if mine.is_floating_point():
            mine.mul_(0.9998).add_(source, alpha=0.0002)  # whose rounding makes it drift


AVERAGES = {
    'ema': dict(type='ExponentialMovingAverage', momentum=0.3),
    'swa': dict(type='StochasticWeightAverage'),
    'annealing': dict(type='MomentumAnnealingEMA', momentum=0.3),
    'yolox': dict(type='mmdet.ExpMomentumEMA', momentum=0.0002, gamma=40),
    'yolox-every-third': dict(type='mmdet.ExpMomentumEMA', momentum=0.0002, gamma=40, interval=3),
    'own-update': dict(type='OwnAverage'),
}
METHODS = {
    'mona': dict(peft=dict(type='Mona', bottleneck=4)),
    'bitfit-bfloat16': dict(trainable='bitfit', frozen_dtype='bfloat16'),
}


@pytest.fixture(scope='module')
def base_file(tmp_path_factory):
    """The pretrained base: a Swin's random weights."""
    file = tmp_path_factory.mktemp('base') / 'base.pth'
    torch.manual_seed(11)
    model = MODELS.build(SWIN)
    model.init_weights()
    torch.save(model.state_dict(), file)
    return file


def config_of(base_file, method='mona', type='CopiedModel'):
    base = dict(SWIN, init_cfg=dict(type='Pretrained', checkpoint=str(base_file)))
    return dict(type=type, backbone=dict(type='mona_mm.PeftBackbone', base=base, **METHODS[method]))


def built(*args, **kwargs):
    model = MODELS.build(config_of(*args, **kwargs))
    model.init_weights()
    return model


def move(model, step):
    """What an optimizer step does to a model, without one."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.01)


def averaged_of(kind, model, update_buffers):
    if kind == 'torch':
        multi = get_ema_multi_avg_fn(0.7)
        return AveragedModel(model, multi_avg_fn=multi, use_buffers=update_buffers)
    return MODELS.build(dict(AVERAGES[kind], model=model, update_buffers=update_buffers))


@pytest.mark.parametrize(
    ('method', 'kind', 'update_buffers'),
    pairwise(
        ['mona', 'bitfit-bfloat16'],
        [*AVERAGES, 'torch'],
        [False, True],
        common=lambda method, kind, buffers: method == 'mona' and (buffers == 'True' or kind in ('ema', 'torch')),
    ),
)
def test_an_average_keeps_the_frozen_part(kind, method, update_buffers, base_file, tmp_path):
    """After many updates by every averaging class what is frozen in the average, statistics of a frozen BatchNorm
    included, is the model's, bit for bit, what trains is averaged as the class does, and the model is as it was. Its
    copies do the same, and its delta loads on the base."""
    model = built(base_file, method)
    before = {name: tensor.clone() for name, tensor in frozen_tensors(model).items()}
    average = averaged_of(kind, model, update_buffers)
    plain = averaged_of(kind, copy.deepcopy(model.head), update_buffers)  # nothing in it is frozen
    if not update_buffers:  # else mmengine's own copies average what is not in them
        average = copy.deepcopy(average)
    for step in range(UPDATES):
        move(model, step)
        average.update_parameters(model)
        plain.update_parameters(model.head)
    assert not differing_frozen(average.module, model)
    now = frozen_tensors(model)
    assert now.keys() == before.keys() and all(torch.equal(now[name], tensor) for name, tensor in before.items())
    assert 'neck.1.running_mean' in now
    trained = average.module.state_dict()
    assert all(torch.equal(trained[f'head.{name}'], t) for name, t in plain.module.state_dict().items())
    name = next(name for name, p in model.named_parameters() if p.requires_grad)
    assert not torch.equal(trained[name], model.state_dict()[name]), 'it is no average'
    if update_buffers and kind not in ('swa', 'yolox-every-third'):
        return  # the same files
    save_delta(model, tmp_path / 'x.delta.safetensors', state_dict=trained)
    fresh = MODELS.build(config_of(base_file, method))
    load_delta(fresh, tmp_path / 'x.delta.safetensors')
    actual = fresh.state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in trained.items())


def test_a_stock_average_is_left_alone():
    """Of a model of which nothing is frozen by us the averaging classes make what they always did, and pickle it."""
    model = MODELS.build(dict(SWIN))
    model.patch_embed.requires_grad_(False)
    average = ExponentialMovingAverage(model)
    assert type(average) is ExponentialMovingAverage
    ours = RoundingAverage(mona_mm.FrozenModel(base=dict(type='FrozenNeck'), trainable='1'), momentum=0.3)
    again = pickle.loads(pickle.dumps(ours))
    model = mona_mm.FrozenModel(base=dict(type='FrozenNeck'), trainable='1')
    for step in range(UPDATES):
        move(model, step)
        again.update_parameters(model)
    assert not differing_frozen(again.module, model) and isinstance(again, RoundingAverage)


@DATASETS.register_module()
class CopyImages(torch.utils.data.Dataset):
    METAINFO = metainfo = dict(classes=('a', 'b'))

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return dict(inputs=torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i)))


def run(model, work_dir, hooks, epochs=2, resume=None, **kwargs):
    loader = dict(batch_size=2, num_workers=0, dataset=dict(type='CopyImages'), sampler=dict(type='DefaultSampler'))
    config = dict(
        model=model,
        work_dir=str(work_dir),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(constructor='mona_mm.PeftOptimWrapperConstructor', optimizer=dict(type='AdamW', lr=1e-2)),
        default_hooks=dict(checkpoint=dict(type='mona_mm.SafeCheckpointHook', interval=1, max_keep_ckpts=1)),
        custom_hooks=[
            dict(type='mona_mm.DeltaCheckpointHook'),
            dict(type='mona_mm.ParamFreezeHook'),
            *(hook for hook in hooks if isinstance(hook, dict)),
        ],
        experiment_name=str(work_dir),
        log_level='INFO',
        randomness=dict(seed=3),
        load_from=resume,
        resume=resume is not None,
        **kwargs,
    )
    runner = build_runner(Config(config))
    for hook in hooks:
        if isinstance(hook, Hook):
            runner.register_hook(hook)
    runner.train()
    return runner


def log_of(runner):
    file = runner.logger.handlers[-1]
    file.flush()
    return open(file.baseFilename).read()


@pytest.mark.parametrize('kind', ['mmdet.ExpMomentumEMA', 'OwnAverage', 'ForeignAverage'])
def test_the_delta_of_an_averaged_run(kind, base_file, tmp_path):
    """A run under EMAHook, resumed once: what the delta holds is the average, on the base that the model has; the
    proof is about both."""
    options = dict(update_buffers=True, momentum=0.0002, gamma=4) if kind.startswith('mmdet') else {}
    hooks = [dict(type='EMAHook', ema_type=kind, **options)]
    run(config_of(base_file), tmp_path, hooks, epochs=1)
    runner = run(config_of(base_file), tmp_path, hooks, resume=str(tmp_path / 'epoch_1.pth'))
    whole = torch.load(tmp_path / 'epoch_2.pth', weights_only=False)
    base = torch.load(base_file)
    for state, prefix in ((whole['state_dict'], 'backbone.'), (whole['ema_state_dict'], 'module.backbone.')):
        assert all(torch.equal(state[prefix + name], tensor) for name, tensor in base.items())
    fresh = MODELS.build(config_of(base_file))
    load_delta(fresh, tmp_path / 'epoch_2.delta.safetensors')
    actual = fresh.state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in whole['state_dict'].items())
    assert 'unchanged, bit for bit, in the model and in its copies (EMAHook)' in log_of(runner)


def test_a_copy_that_a_hook_makes(base_file, tmp_path):
    """A hook that averages by hand, in a copy made after training has begun: kept. A teacher with weights of its own
    in the same hook is not touched."""
    runner = run(config_of(base_file), tmp_path, [dict(type='HookWithACopy')], epochs=1)
    (hook,) = (hook for hook in runner.hooks if isinstance(hook, HookWithACopy))
    assert not differing_frozen(hook.copies[0], runner.model)
    assert all(torch.equal(hook.taught[name], tensor) for name, tensor in hook.teacher.state_dict().items())
    assert 'in its copies (HookWithACopy)' in log_of(runner)


def test_the_proof_sees_a_copy(base_file, tmp_path, monkeypatch):
    """Where nothing keeps the frozen part of an average, the hook refuses the checkpoint."""
    monkeypatch.setattr('mona_mm.hooks.param_freeze.keep_frozen_part', lambda copy, model: None)
    with pytest.raises(FreezeError, match='copy of the model in EMAHook.*backbone'):
        run(config_of(base_file), tmp_path, [dict(type='EMAHook', ema_type='ForeignAverage')], epochs=1)


class Teaching(Hook):
    """Looks at the teacher whenever it is used."""

    priority = 'LOWEST'

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        model = runner.model
        assert not differing_frozen(model.teacher, model.student)


@pytest.mark.parametrize('skip_buffer', [True, False])
@pytest.mark.parametrize('method', METHODS)
def test_a_teacher_follows(method, skip_buffer, base_file, tmp_path):
    """Mean teacher: it starts, the teacher's frozen part is the base's in every iteration, its method and head move
    and are in the delta with the student's, from which both come back; resumed, it goes on."""
    config = dict(type='StudentAndTeacher', detector=config_of(base_file, method))
    hooks = [dict(type='mmdet.MeanTeacherHook', momentum=0.3, skip_buffer=skip_buffer), Teaching()]
    run(config, tmp_path, hooks, epochs=1)
    runner = run(config, tmp_path, hooks, resume=str(tmp_path / 'epoch_1.pth'))
    model = runner.model
    assert moving_copies(model) == {'teacher': 'student'}
    assert 'bit for bit, in the model and in its copies (teacher)' in log_of(runner)
    delta = read_delta(tmp_path / 'epoch_2.delta.safetensors')
    names = changing(model.student)
    assert set(delta.tensors) == {f'{part}.{name}' for part in ('student', 'teacher') for name in names}
    assert any(
        not torch.equal(delta.tensors[f'student.{name}'], delta.tensors[f'teacher.{name}'])
        for name, p in model.student.named_parameters()
        if p.requires_grad
    )
    assert {delta.header.part(name) for name in delta.tensors} == {'method', 'student', 'teacher'}
    assert delta.header.copies == dict(teacher='student')
    fresh = MODELS.build(config)
    load_delta(fresh, delta.file)
    actual, expected = fresh.state_dict(), model.state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    count = count_trainable(model)
    assert count.backbone_trainable == count_trainable(model.student).backbone_trainable
    assert count.total == sum(p.numel() for p in model.parameters())


@pytest.mark.slow
def test_soft_teacher(base_file, demo_data, tmp_path):
    """mmdet's own semi-supervised config, made small and with Mona in its backbone, trains, validates both of its
    models and writes a delta from which they come back."""
    import mmdet

    configs = Path(mmdet.__file__).parent / '.mim/configs/soft_teacher'
    cfg = Config.fromfile(configs / 'soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py')

    def small(node):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if key == 'scale':
                node[key] = [(64, 64), (72, 72)] if isinstance(value[0], tuple | list) else (64, 64)
            elif isinstance(value, dict | list):
                small(value)

    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        small(loader)
        loader.update(num_workers=0, persistent_workers=False)
        for data in loader.dataset.get('datasets', [loader.dataset]):
            what = 'train' if 'datasets' in loader.dataset else 'val'
            data.update(data_root=str(demo_data), ann_file=f'annotations/instances_{what}2017.json')
            data.update(metainfo=dict(classes=('disc', 'square', 'triangle', 'star')))
    cfg.train_dataloader.batch_size = 2
    cfg.train_dataloader.sampler.update(batch_size=2, source_ratio=[1, 1])
    cfg.val_evaluator.ann_file = cfg.test_evaluator.ann_file = f'{demo_data}/annotations/instances_val2017.json'
    detector = cfg.model.detector
    detector.backbone = config_of(base_file)['backbone']
    detector.neck.update(in_channels=[8, 16], out_channels=8)
    detector.rpn_head.update(in_channels=8, feat_channels=8)
    detector.roi_head.bbox_roi_extractor.out_channels = 8
    detector.roi_head.bbox_head.update(in_channels=8, fc_out_channels=16, num_classes=4)
    detector.train_cfg.rpn_proposal.max_per_img = detector.test_cfg.rpn.max_per_img = 8
    cfg.model.semi_train_cfg.update(pseudo_label_initial_score_thr=0.2, jitter_times=2)
    cfg.train_cfg.update(max_iters=2, val_interval=2)
    cfg.optim_wrapper.update(constructor='mona_mm.PeftOptimWrapperConstructor')
    cfg.default_hooks.checkpoint = dict(type='mona_mm.SafeCheckpointHook', interval=2, by_epoch=False)
    cfg.custom_hooks += [dict(type=f'mona_mm.{name}Hook') for name in ('ParamFreeze', 'LoadCheck', 'DeltaCheckpoint')]
    cfg.merge_from_dict(dict(work_dir=str(tmp_path), log_level='ERROR', randomness=dict(seed=0)))
    runner = build_runner(cfg)
    runner.train()
    assert not differing_frozen(runner.model.teacher, runner.model.student)
    fresh = MODELS.build(cfg.model)
    load_delta(fresh, tmp_path / 'iter_2.delta.safetensors')
    actual = fresh.state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in runner.model.state_dict().items())
    assert any('teacher' in name for name in read_delta(tmp_path / 'iter_2.delta.safetensors').tensors)


def test_a_teacher_with_weights_of_its_own(base_file, tmp_path):
    """A fixed teacher with another base beside the student is neither made equal nor taken for one that moved."""
    config = dict(type='StudentAndTeacher', detector=config_of(base_file))

    class OtherBase(Hook):
        def before_train(self, runner):
            with torch.no_grad():
                runner.model.teacher.backbone.patch_embed.projection.weight.add_(1)
            self.before = copy.deepcopy(runner.model.teacher.state_dict())

    other = OtherBase()
    other.priority = 'HIGHEST'
    runner = run(config, tmp_path, [other], epochs=1)
    after = runner.model.teacher.state_dict()
    assert all(torch.equal(after[n], t) for n, t in other.before.items() if 'running' not in n and 'num_b' not in n)


def test_what_is_frozen_of_a_teacher_may_not_move_else(base_file, tmp_path):
    class Writes(Hook):
        priority = 'LOWEST'

        def before_save_checkpoint(self, runner, checkpoint):
            runner.model.student.backbone.patch_embed.projection.weight.data.add_(1)

    config = dict(type='StudentAndTeacher', detector=config_of(base_file))
    with pytest.raises(FreezeError, match='frozen but changed'):
        run(config, tmp_path, [dict(type='mmdet.MeanTeacherHook'), Writes()], epochs=2)


def test_a_momentum_encoder_follows(base_file, tmp_path):
    """An averaging object in the model, as in mmpretrain's MoCo, BYOL and MoCoV3."""
    config = config_of(base_file, type='MomentumEncoder')
    runner = run(config, tmp_path, [])
    model = runner.model
    assert moving_copies(model) == {'encoder_k.module.0': 'backbone', 'encoder_k.module.1': 'neck'}
    assert not differing_frozen(model.encoder_k.module[0], model.backbone)
    held = set(read_delta(tmp_path / 'epoch_2.delta.safetensors').tensors)
    moves = {name.replace('backbone.', 'encoder_k.module.0.', 1) for name in changing(model) if name[:4] == 'back'}
    assert moves <= held and {'encoder_k.steps', 'encoder_k.module.1.0.weight'} <= held
    fresh = MODELS.build(config)
    load_delta(fresh, tmp_path / 'epoch_2.delta.safetensors')
    actual = fresh.state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in model.state_dict().items())


def test_a_delta_of_another_base_is_refused(base_file, tmp_path):
    """That the frozen part of an average is not looked at does not mean that the model's own is not."""
    model = built(base_file)
    save_delta(model, tmp_path / 'x.delta.safetensors')
    other = built(base_file)
    with torch.no_grad():
        other.neck[1].running_mean.add_(1)
    with pytest.raises(CheckpointMismatchError, match='another frozen base.*neck.1.running_mean'):
        load_delta(other, tmp_path / 'x.delta.safetensors')


def test_a_teacher_in_a_frozen_model_and_merged():
    """Rules of a whole student and teacher leave the teacher to its hook; merged, it still does not train."""
    detector = dict(
        type='CopiedModel', backbone=dict(type='mona_mm.PeftBackbone', base=SWIN, peft=dict(type='LoRA', rank=2))
    )
    model = mona_mm.FrozenModel(dict(type='StudentAndTeacher', detector=detector), 'student.head')
    assert moving_copies(model) == dict(teacher='student')
    mona_mm.merge(model)
    assert all(p.requires_grad for p in model.student.parameters())
    assert not any(p.requires_grad for p in model.teacher.parameters())
