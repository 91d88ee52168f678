"""SPT's sensitivity: the sum of squared gradients that plain autograd gives, in one process or two, and its errors."""

import copy
import json
import math
import runpy
import sys

import pytest
import torch
from conftest import ROOT
from helpers import assert_near, in_processes, run_tool
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from mmpretrain.structures import DataSample

from mona_mm.config.load import adapt_to_device, load_config
from mona_mm.errors import ConfigError, MissingFileError, SensitivityError
from mona_mm.spt import Plan, Sensitivity, allocate, compute_sensitivity
from mona_mm.spt import sensitivity as module
from mona_mm.spt.sensitivity import set_seed
from mona_mm.spt_plans.sensitivity import base_model_config, build_loader, measure

BACKBONES = {
    'vit': dict(
        type='mmpretrain.VisionTransformer',
        arch=dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32),
        img_size=32,
        patch_size=8,
        drop_path_rate=0.3,
    ),
    'swin': dict(
        type='mmpretrain.SwinTransformer',
        arch=dict(embed_dims=12, depths=(1, 2), num_heads=(1, 2)),
        img_size=32,
        window_size=4,
        drop_path_rate=0.3,
        out_indices=(1,),
    ),
}

HEAD_INIT = dict(type='TruncNormal', layer='Linear', std=0.02)


def classifier(name='vit', head=None, **backbone):
    init_default_scope('mmpretrain')
    width = {'vit': 16, 'swin': 24}[name]
    # mmpretrain's ViT head begins as zero, and then no gradient passes it.
    head = head or dict(type='VisionTransformerClsHead' if name == 'vit' else 'LinearClsHead', init_cfg=HEAD_INIT)
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone={**BACKBONES[name], **backbone},
            neck=None if name == 'vit' else dict(type='GlobalAveragePooling'),
            head=dict(num_classes=5, in_channels=width, **head),
            data_preprocessor=dict(mean=[127.0] * 3, std=[60.0] * 3),
        )
    )
    model.init_weights()
    return model


def class_batches(count=3, size=4):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        images = torch.randint(0, 256, (size, 3, 32, 32), generator=generator, dtype=torch.uint8)
        samples = [DataSample().set_gt_label(int(torch.randint(5, (1,), generator=generator))) for _ in range(size)]
        yield dict(inputs=list(images), data_samples=samples)


def plain(model, batches, per_sample=False, seed=0):
    """The definition: sum over batches (or samples) of torch.autograd.grad, squared."""
    model = copy.deepcopy(model).train()
    parameters = dict(model.backbone.named_parameters())
    squares = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for number, batch in enumerate(batches):
        set_seed(seed, number)
        pieces = [batch]
        if per_sample:
            pieces = [
                dict(inputs=[image], data_samples=[sample])
                for image, sample in zip(batch['inputs'], batch['data_samples'], strict=True)
            ]
        for piece in pieces:
            losses = model(**model.data_preprocessor(piece, True), mode='loss')
            loss = sum(sum(v) if isinstance(v, list) else v for k, v in losses.items() if 'loss' in k)
            for p in parameters.values():
                p.requires_grad_(True)
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    squares[name] += gradient**2
    return squares


def assert_alike(sensitivity: Sensitivity, expected: dict[str, torch.Tensor], relative: float = 1e-5) -> None:
    """The sums of squares by their roots, which are of the size of gradients."""
    assert {part.name for part in sensitivity.architecture.parts} == set(sensitivity.squares)
    roots = {name: expected[name].sqrt() for name in sensitivity.squares}
    assert_near({name: squares.sqrt() for name, squares in sensitivity.squares.items()}, roots, relative)


@pytest.mark.parametrize('per_sample', [False, True])
@pytest.mark.parametrize('name', BACKBONES)
def test_classifier_equals_a_plain_loop(name, per_sample):
    """Sums of squared gradients as torch.autograd.grad gives them, DropPath at work; something was measured."""
    model = classifier(name)
    found = compute_sensitivity(model, class_batches(), 3, per_sample, progress=False)
    expected = plain(model, class_batches(), per_sample)
    assert_alike(found, expected)
    assert all((s > 0).any() for n, s in found.squares.items() if not n.endswith('qkv.bias'))
    other = plain(model, class_batches(), not per_sample)
    weight = next(n for n in expected if n.endswith('proj.weight'))
    assert not torch.allclose(found.squares[weight], other[weight], rtol=0.05), 'batches and samples must differ'


def test_detector_equals_a_plain_loop(detector_config):
    """The demo's Cascade Mask R-CNN: all its losses, its sampling and its BatchNorms."""
    detector_config.model.backbone.base.drop_path_rate = 0.2
    detector_config.model.backbone.peft = None
    adapt_to_device(detector_config)
    init_default_scope('mmdet')
    set_seed(0, 99)
    model = MODELS.build(detector_config.model)
    loader = list(build_loader(detector_config, 2, seed=0))
    found = compute_sensitivity(model, loader, 2, progress=False)
    assert_alike(found, plain(model, loader))
    assert found.info['num_batches'] == 2


def test_segmentor_equals_a_plain_loop():
    """A segmentor of mmseg; pixels without a label are no labels."""
    model = segmentor()
    found = compute_sensitivity(model, segmentation_batches(), 2, progress=False)
    assert_alike(found, plain(model, segmentation_batches()))
    with pytest.raises(SensitivityError, match='no labelled image in 2 batches'):
        compute_sensitivity(segmentor(), segmentation_batches(255), 2, progress=False)


def segmentor():
    init_default_scope('mmseg')
    head = dict(in_channels=24, in_index=0, channels=8, num_classes=3, num_convs=1, norm_cfg=dict(type='BN'))
    swin = dict(embed_dims=12, depths=(1, 1), num_heads=(1, 2), strides=(4, 2), window_size=4, out_indices=(1,))
    return MODELS.build(
        dict(
            type='EncoderDecoder',
            backbone=dict(type='mmseg.SwinTransformer', **swin),
            decode_head=dict(type='FCNHead', **head),
            data_preprocessor=dict(type='SegDataPreProcessor', size=(32, 32), mean=[127.0] * 3, std=[60.0] * 3),
        )
    )


def segmentation_batches(label=None):
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        samples = []
        for _ in range(2):
            labels = torch.randint(3, (1, 32, 32), generator=generator)
            sample = SegDataSample(metainfo=dict(img_shape=(32, 32), ori_shape=(32, 32)))
            sample.gt_sem_seg = PixelData(data=labels if label is None else torch.full_like(labels, label))
            samples.append(sample)
        images = torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
        yield dict(inputs=list(images), data_samples=samples)


def test_checkpointed_blocks_have_their_gradients(detector_config):
    """with_cp in the base, whose re-entrant checkpoints skip a block when its input needs no gradient: same sums."""
    adapt_to_device(detector_config)
    first = measure(detector_config, 1)
    detector_config.model.backbone.base.with_cp = True
    second = measure(detector_config, 1)
    # A re-entrant checkpoint's first forward is without gradients, where the attention is fused: it rounds otherwise.
    assert_alike(second, first.squares)
    assert (second.squares['stages.0.blocks.0.ffn.layers.1.weight'] > 0).any()


def test_model_is_left_as_it_was_and_no_gradient_stays(monkeypatch):
    """One gradient at a time exists during the backward pass, none afterwards; requires_grad, modes and weights of the
    model are as before."""
    model = classifier().eval()
    model.backbone.requires_grad_(False)
    model.backbone.layers[0].train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    alive = []
    add = module._add_square

    def counted(total, parameter):
        alive.append(sum(p.grad is not None for p in model.parameters()))
        add(total, parameter)

    monkeypatch.setattr(module, '_add_square', counted)
    compute_sensitivity(model, class_batches(), 3, progress=False)
    assert max(alive) == 1 and len(alive) == 3 * len(list(model.backbone.parameters()))
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
    assert required == {name: p.requires_grad for name, p in model.named_parameters()}
    assert modes == {name: m.training for name, m in model.named_modules()}
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_only_what_is_asked_for_is_fetched(capsys):
    """num_batches of a longer loader, without fetching one more; all of a shorter one, which is said."""
    fetched = []

    def counted(count):
        for batch in class_batches(count):
            fetched.append(1)
            yield batch

    found = compute_sensitivity(classifier(), counted(4), 2, progress=False)
    assert len(fetched) == 2 and found.info['num_batches'] == 2
    found = compute_sensitivity(classifier(), class_batches(2), 5)
    assert found.info['num_batches'] == 2
    out = capsys.readouterr()
    assert 'ended after 2 of 5 batches' in out.out + out.err and '2/5' in out.out


# ---------------------------------------------------------------------------------------- from a config


def test_measure_is_a_function_of_the_seed_alone(detector_config):
    """The same sums twice and with a loader's worker process; others with another seed. Augmentation is at work."""
    detector_config.model.backbone.base.drop_path_rate = 0.2
    adapt_to_device(detector_config)
    first = measure(detector_config, 2)
    torch.rand(7)
    detector_config.train_dataloader.update(num_workers=1, persistent_workers=True)
    second = measure(detector_config, 2)
    assert all(torch.equal(s, second.squares[n]) for n, s in first.squares.items())
    assert first.info == second.info
    third = measure(detector_config, 2, seed=1)
    assert not any(torch.equal(s, third.squares[n]) for n, s in first.squares.items())
    assert first.info['config_fingerprint'] == third.info['config_fingerprint']


def test_the_method_of_the_config_is_left_out(detector_config):
    """A config with Mona, with SPT and a plan that does not exist yet, and without a method give the same."""
    adapt_to_device(detector_config)
    found = []
    for peft in (dict(type='Mona', bottleneck=4), dict(type='SPT', plan='nowhere.safetensors'), None):
        detector_config.model.backbone.peft = peft
        found.append(measure(detector_config, 1))
    for other in found[1:]:
        assert all(torch.equal(s, other.squares[n]) for n, s in found[0].squares.items())
        assert other.info == found[0].info


def test_pretrained_weights_are_loaded_and_remembered(detector_config, tmp_path):
    """The sensitivity is that of the pretrained base, and the plan tells when others are loaded."""
    adapt_to_device(detector_config)
    init_default_scope('mmdet')
    torch.manual_seed(5)
    base = MODELS.build(dict(detector_config.model.backbone.base))
    base.init_weights()
    torch.save(base.state_dict(), tmp_path / 'base.pth')
    random = measure(detector_config, 1)
    detector_config.model.backbone.base.init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth'))
    found = measure(detector_config, 1)
    assert not torch.equal(*(s.squares['stages.1.blocks.0.ffn.layers.1.weight'] for s in (found, random)))
    plan = allocate(found, 3000)
    assert plan.info['pretrained'].endswith('base.pth') and 'pretrained' not in random.info
    plan.check_weights(base)
    torch.nn.init.ones_(base.stages[1].blocks[0].norm1.bias)
    with pytest.raises(ValueError, match='made for other weights'):
        plan.check_weights(base)


# ---------------------------------------------------------------------------------------- several processes


def measure_a_part(out: str) -> None:
    """One of several processes: its share of the batches, into a file; and again with a batch that is not finite, which
    only the second process meets."""
    torch.distributed.init_process_group('gloo')
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    batches = list(class_batches(3))
    found = compute_sensitivity(classifier('swin'), batches[rank::world], 3, progress=False)
    if rank == 0:
        found.save(out)
    if rank == 1:
        batches[1]['inputs'][0] = torch.full((3, 32, 32), float('nan'))
    try:
        compute_sensitivity(classifier('swin'), batches[rank::world], 3, progress=False)
    except SensitivityError as error:
        print(f'process {rank}: {error}', flush=True)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize('world', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_equal_one(world, tmp_path):
    """Three batches over two or four gloo processes, of which one has none, give the sums of one; what only the second
    process meets, a loss that is not finite, ends all with the same error instead of leaving the others waiting."""
    out = in_processes(world, tmp_path, measure_a_part, str(tmp_path / 's.safetensors'))
    expected = compute_sensitivity(classifier('swin'), class_batches(3), 3, progress=False)
    found = Sensitivity.load(tmp_path / 's.safetensors')
    assert_alike(found, expected.squares)
    assert found.info == expected.info
    for rank in range(world):
        assert f'process {rank}: The loss of batch 1 is nan' in out


@pytest.mark.slow
def test_two_processes_of_the_command_line(detector_config, tmp_path, tool):
    """tools/spt_sensitivity.py under torchrun on the detector, whose losses average over processes in training: an odd
    number of batches gives one process's sensitivity, and the same plan."""
    detector_config.dump(tmp_path / 'config.py')
    common = [tmp_path / 'config.py', '--budget', '2%', '--num-batches', '3']
    outputs = [['--work-dir', tmp_path / n, '--save-sensitivity', tmp_path / n / 's'] for n in ('two', 'one')]
    arguments = *map(str, (*common, *outputs[0])), '--launcher', 'pytorch'
    in_processes(2, tmp_path, run_tool, 'spt_sensitivity.py', *arguments)
    status, out, err = tool(*common, *outputs[1])
    assert status == 0, err
    two, one = (Sensitivity.load(tmp_path / name / 's') for name in ('two', 'one'))
    assert_alike(two, one.squares)
    plans = [Plan.load(tmp_path / name / 'plan.safetensors') for name in ('two', 'one')]
    assert plans[0].structured == plans[1].structured and plans[0].vectors == plans[1].vectors
    assert plans[0].counts.total == plans[1].counts.total


# ---------------------------------------------------------------------------------------- the command line


@pytest.fixture
def tool(monkeypatch, capsys):
    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, 'argv', ['spt_sensitivity.py', *map(str, arguments)])
        status = 0
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / 'tools/spt_sensitivity.py'), run_name='__main__')
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


DEMO = 'configs/demo/demo_mona_shapes.py'


def test_command_line(drawn_charts, tool, demo_data, tmp_path):
    """Measure once, plan twice: the plan and the pictures are where they were asked for, and the second plan, of
    another kind and budget, needs no data."""
    status, out, err = tool(
        DEMO, '--budget', '40k', '--num-batches', '1', '--out', tmp_path / 'lora.safetensors', '--plot', tmp_path / 'p',
        '--save-sensitivity', tmp_path / 's.safetensors', '--work-dir', tmp_path / 'work',
        '--cfg-options', f'data_root={demo_data}',
    )  # fmt: skip
    assert status == 0, err
    plan = Plan.load(tmp_path / 'lora.safetensors')
    assert plan.counts.total <= 40000 and f'{plan.counts.total:,} parameters of SwinTransformer' in out
    assert plan.structured_config == dict(type='LoRA', rank=8)
    assert plan.info['config'] == 'demo_mona_shapes.py' and plan.info['images'] == 6
    assert {path.name for path in (tmp_path / 'p').iterdir()} == {
        'plan.png', 'sensitivity_by_depth.png', 'sensitivity_by_operation.png',
    }  # fmt: skip
    status, out, err = tool(
        DEMO, '--budget', '3%', '--structured', 'Mona', '--sensitivity', tmp_path / 's.safetensors',
        '--work-dir', tmp_path / 'work', '--cfg-options', 'data_root=/nowhere',
    )  # fmt: skip
    assert status == 0, err
    plan = Plan.load(tmp_path / 'work/plan.safetensors')
    assert plan.structured_config['type'] == 'Mona'
    assert plan.counts.total <= 0.03 * plan.architecture.parameters
    status, _, err = tool(
        DEMO, '--budget', '1%', '--sensitivity', tmp_path / 's.safetensors', '--work-dir', tmp_path / 'work'
    )
    assert status == 2 and 'plan.safetensors already exists' in err, 'a plan that a run may have left stays'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--budget', 'lots'], "budget='lots' must be"),
        (['--budget', '400%'], 'above the backbone'),
        (['--budget', '0'], 'below the smallest possible plan'),
        (['--budget', '1%', '--num-batches', '0'], 'num_batches=0'),
        (['--budget', '1%', '--sensitivity', 'nowhere'], 'nowhere'),
        (['--budget', '1%', '--cfg-options', 'data_root=/nowhere'], '--cfg-options data_root='),
    ],
)
def test_bad_input_ends_in_one_line(tool, arguments, message, demo_data, tmp_path):
    """A user's mistake ends the command with status 2 and one line that names it."""
    arguments = [*arguments, '--num-batches', '1'] if '--num-batches' not in arguments else arguments
    if '--cfg-options' not in arguments:
        arguments = [*arguments, '--cfg-options', f'data_root={demo_data}']
    status, _, err = tool(DEMO, '--work-dir', tmp_path, *arguments)
    assert status == 2 and 'Traceback' not in err
    last = err.rstrip().splitlines()[-1]
    assert last.startswith('error: ') and message in last and err.count('error: ') == 1


# ---------------------------------------------------------------------------------------- bad data


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_batch(value):
    """The batch's number and the images in it; the model is usable afterwards."""
    batches = list(class_batches())
    batches[2]['inputs'][1] = torch.full((3, 32, 32), value)
    for sample in batches[2]['data_samples']:
        sample.set_metainfo(dict(img_path='cat.jpg'))
    model = classifier()
    with pytest.raises(SensitivityError, match=r'loss of batch 2 is nan \(cat.jpg, .*finite'):
        compute_sensitivity(model, batches, 3, progress=False)
    compute_sensitivity(model, batches, 2, progress=False)


def test_no_labelled_images(detector_config, demo_data, tmp_path):
    """A data set without images, without annotations, classes without instances, samples without labels, no batch at
    all: the same clear error."""
    with pytest.raises(SensitivityError, match='no labelled image in batch 1'):
        batches = list(class_batches(2))
        batches[1]['data_samples'] = [DataSample() for _ in range(4)]
        compute_sensitivity(classifier(), batches, 2, progress=False)
    with pytest.raises(SensitivityError, match='no labelled image in 0 batches'):
        compute_sensitivity(classifier(), [], 2, progress=False)

    adapt_to_device(detector_config)
    content = json.loads((demo_data / 'annotations/instances_train2017.json').read_text())
    for removed, images in ((('annotations',), 'kept'), (('images', 'annotations'), 'gone')):
        path = tmp_path / f'{images}.json'
        path.write_text(json.dumps({**content, **{key: [] for key in removed}}))
        detector_config.train_dataloader.dataset.update(ann_file=str(path))
        for filter_empty in (True, False):
            detector_config.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=filter_empty)
            with pytest.raises(SensitivityError, match='There is no labelled image'):
                measure(detector_config, 1)


def test_a_head_that_begins_as_zero():
    """mmpretrain's own initialisation of a ViT's head lets no gradient pass: said, and not a plan of nothing."""
    model = classifier(head=dict(type='VisionTransformerClsHead'))
    with pytest.raises(SensitivityError, match='gradient of every weight .* is zero.*init_cfg'):
        compute_sensitivity(model, class_batches(), 2, progress=False)


def test_other_mistakes(detector_config):
    """A backbone that carries a method; a backbone that is no host; per-sample squares through a BatchNorm that
    cannot take one sample; a whole number of batches."""
    adapt_to_device(detector_config)
    init_default_scope('mmdet')
    with pytest.raises(ConfigError, match='peft=None'):
        compute_sensitivity(MODELS.build(detector_config.model), [], 1)
    with pytest.raises(ConfigError, match='num_batches=1.5'):
        compute_sensitivity(classifier(), class_batches(), 1.5)
    with pytest.raises(TypeError, match='not a supported host'):
        model = classifier()
        model.backbone = torch.nn.Linear(2, 2)
        compute_sensitivity(model, class_batches(), 1)
    with pytest.raises(MissingFileError):
        Sensitivity.load('nowhere')
    normed = classifier()
    normed.head.layers = torch.nn.Sequential(torch.nn.BatchNorm1d(16), normed.head.layers)
    normed.head.forward = lambda feats: normed.head.layers(feats[-1])
    normed.head.loss = lambda feats, samples: dict(loss=normed.head(feats).square().sum())
    with pytest.raises(ConfigError, match='per_sample=False'):
        compute_sensitivity(normed, class_batches(), 1, per_sample=True, progress=False)


def test_stacked_batches():
    """Images that a classifier's collate function has stacked are split into samples as well."""
    batches = list(class_batches())
    stacked = [dict(b, inputs=torch.stack(b['inputs'])) for b in batches]
    model = classifier()
    expected = compute_sensitivity(model, batches, 3, per_sample=True, progress=False)
    found = compute_sensitivity(model, stacked, 3, per_sample=True, progress=False)
    assert_alike(found, expected.squares)


def test_the_configs_can_be_unwrapped():
    """The shipped detection config: its base is what is measured, and no method is in it."""
    cfg = load_config(str(ROOT / 'configs/mona/cascade_swin_b_coco.py'))
    backbone = base_model_config(cfg)['backbone']
    assert backbone == dict(type='mona_mm.PeftBackbone', base=cfg.model.backbone.base)
    assert cfg.model.backbone.peft.type == 'Mona', 'the config itself is as it was'
    cfg.model = dict(type='mona_mm.FrozenModel', base=cfg.model, trainable='roi_head')
    assert base_model_config(cfg)['base']['backbone'] == backbone
