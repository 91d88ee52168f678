"""A method in chosen blocks alone, and of another width in some of them: where its modules are, what they compute, how
many parameters they have, and that nothing before the first of them is kept for the backward pass."""

import re

import pytest
import torch
from conftest import HOSTS, ROOT
from declared_hosts import DECLARED
from helpers import assert_equal, assert_near
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from suite import images, off_initial_values
from torch.autograd.graph import saved_tensors_hooks
from toy_runs import log_of

from mona_mm import PeftBackbone, count_trainable
from mona_mm.errors import ConfigError
from mona_mm.frozen.activations import measure_activations, training_size
from mona_mm.hosts import PeftBlock, find_host, method_modules, method_names
from mona_mm.methods import deploy
from mona_mm.methods.blocks import choose_blocks, in_each_block
from mona_mm.nn.meta import meta_device

BEIT = DECLARED['mmpretrain-beit']
BACKBONES = {
    'swin': HOSTS['mmdet-swin'],
    'swin-with_cp': dict(HOSTS['mmdet-swin'], with_cp=True),
    'vit': HOSTS['mmpretrain-vit'],
    'beit': dict(
        DECLARED['mmpretrain-beit'], arch={**DECLARED['mmpretrain-beit']['arch'], 'num_layers': 4}, out_indices=[0, 3]
    ),
}
MONA = dict(type='Mona', bottleneck=8)
PATHS = ('stages.0.blocks.0', 'stages.0.blocks.1', 'stages.1.blocks.0', 'stages.10.blocks.0', 'stages.2.blocks.0')

CHOICES = {
    'all': (None, [0, 1, 2, 3, 4]),
    'last': ('last 2', [3, 4]),
    'from': ('3:', [3, 4]),
    'to': (':-3', [0, 1]),
    'every-second': ('::2', [0, 2, 4]),
    'indices': ([-1, 0, 0], [0, 4]),
    'a-stage': ('stages.1', [2]),
    'a-pattern': ('stages.*.blocks.0', [0, 2, 3, 4]),
    'mixed': (['stages.{1,2}', 1, 'last 1'], [1, 2, 4]),
}


@pytest.mark.parametrize(('blocks', 'expected'), CHOICES.values(), ids=CHOICES)
def test_blocks_are_chosen(blocks, expected):
    assert choose_blocks('Mona', blocks, PATHS) == tuple(PATHS[index] for index in expected)


WIDTHS = {
    'one': (7, [7, 7, 7, 7, 7]),
    'the-longest-counts': ({'stages.0': 1, 'stages': 2, 'stages.0.blocks.1': 3}, [1, 3, 2, 2, 2]),
    'a-stage-is-a-whole-name': ({'stages.1': 1, 'default': 2}, [2, 2, 1, 2, 2]),
    'a-pattern': ({'stages.*.blocks.0': 1, 'default': 2}, [1, 2, 1, 1, 1]),
    'a-name-before-a-wildcard': ({'stages.{0,1,2}': 1, 'stages.1': 5, 're:stages.*': 3}, [1, 1, 5, 3, 1]),
    'equally-specific-of-one-width': ({'*.0': 1, 'stages.*': 1}, [1, 1, 1, 1, 1]),
}


@pytest.mark.parametrize(('value', 'expected'), WIDTHS.values(), ids=WIDTHS)
def test_widths_follow_patterns(value, expected):
    assert in_each_block('Mona', 'bottleneck', value, PATHS) == dict(zip(PATHS, expected, strict=True))


WRONG = {
    'more-than-there-are': (dict(blocks='last 9'), "'last 9', but this backbone has 5 blocks"),
    'empty': (dict(blocks='9:'), r"blocks='9:' selects none of the 5 blocks, which are stages\.0\.blocks\.0 \(0\) to"),
    'none': (dict(blocks='last 0'), 'selects none'),
    'no-step': (dict(blocks='::0'), "'::0' matches no block"),
    'thousands-of-digits': (dict(blocks='9' * 5000 + ':'), 'matches no block'),
    'no-such-index': (dict(blocks=[0, 5]), 'blocks has 5, but'),
    'no-such-path': (dict(blocks=['stage.1']), r"'stage\.1' matches no block .* Did you mean 'stages\.1'"),
    'a-number': (dict(blocks=2), "blocks=2 must be 'last 6', a slice"),
    'nothing': (dict(blocks=[]), r'blocks=\[\] must be'),
    'a-bool': (dict(blocks=[True]), 'must be'),
    'no-such-width': (dict(bottleneck={'stage.1': 4, 'default': 2}), r"'stage\.1' of bottleneck .* mean 'stages\.1'"),
    'no-default': (dict(bottleneck={'stages.1': 4}), r'no pattern .* matches the block stages\.0\.blocks\.0'),
    'equally-specific': (dict(bottleneck={'stages.*0': 4, 'stages.0*': 2, 'default': 3}), 'equally specific'),
    'not-a-width': (dict(bottleneck={'stages.1': 0, 'default': 2}), r"bottleneck\['stages\.1'\]=0 must be a whole"),
    'no-patterns': (dict(bottleneck={}), 'must have patterns of blocks as its keys'),
    'not-patterns': (dict(bottleneck={1: 2}), 'must have patterns of blocks as its keys'),
    'too-wide': (dict(bottleneck={'stages.1': 193, 'default': 2}), 'bottleneck=193 must be at most 192'),
    'no-width': (dict(dropout={'stages.1': 0.1, 'default': 0.2}), 'dropout=.* must be a probability'),
    'elsewhere': (dict(blocks='last 1', bottleneck={'stages.0': 4, 'default': 2}), "'stages.0' .* that it is in"),
}


@pytest.mark.parametrize(('options', 'message'), WRONG.values(), ids=WRONG)
def test_wrong_choices_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        PeftBackbone(base=HOSTS['mmdet-swin'], peft={**MONA, **options})


def test_a_method_that_chooses_its_blocks_has_no_such_option():
    with pytest.raises(ConfigError, match='SPT itself decides in which blocks'):
        PeftBackbone(base=HOSTS['mmdet-swin'], peft=dict(type='SPT', plan={}, blocks='last 2'))


def test_blocks_without_the_site_are_refused():
    """Only the blocks of an HRNet's first stage have 1x1 convolutions."""
    lora = dict(type='LoRA', rank=2, sites=['fc1', 'fc2'])
    PeftBackbone(base=DECLARED['mmdet-hrnet'], peft=lora)
    with pytest.raises(ConfigError, match="none of the blocks 'last 2' has a site fc1 or fc2"):
        PeftBackbone(base=DECLARED['mmdet-hrnet'], peft=dict(lora, blocks='last 2'))


@pytest.mark.parametrize('name', BACKBONES)
def test_other_blocks_compute_the_stock_block(name):
    """The outputs are those of the method in all blocks, with modules that do nothing in the others: Mona's last layer,
    which is added to the stream, is zero there."""
    late = PeftBackbone(base=BACKBONES[name], peft=dict(MONA, blocks='last 2'))
    late.init_weights()
    off_initial_values(late)
    full = PeftBackbone(base=BACKBONES[name], peft=MONA)
    left = full.load_state_dict(late.state_dict(), strict=False)
    assert not left.unexpected_keys and set(left.missing_keys) == method_names(full) - method_names(late)
    chosen = list(find_host(late).blocks(late))[-2:]
    assert {path for path, m in late.named_modules() if isinstance(m, PeftBlock) and len(m.peft)} == set(chosen)
    with torch.no_grad():
        for path, block in find_host(full).blocks(full).items():
            for module in block.peft.values() if path not in chosen else ():
                module.up.weight.zero_()
                module.up.bias.zero_()
    x = images()
    assert_near(list(full.eval()(x)), list(late.eval()(x)))


METHODS = {
    'mona': dict(type='Mona', bottleneck=8),
    'lora': dict(type='LoRA', rank=4, sites=['q', 'v', 'fc2']),
    'adapter': dict(type='Adapter', bottleneck=8),
    'adaptformer': dict(type='AdaptFormer', bottleneck=8),
    'lorand': dict(type='LoRand', inner=4),
    'rein': dict(type='Rein', num_tokens=8, rank=4),
}


@pytest.mark.parametrize('fast', [True, False], ids=['fast', 'plain'])
@pytest.mark.parametrize(
    ('name', 'method'),
    [*((name, 'mona') for name in BACKBONES), *(('swin', name) for name in METHODS if name != 'mona')],
)
def test_nothing_is_kept_before_the_first_block(name, method, fast):
    """In training autograd has saved nothing and recorded nothing when the first tuned block begins; a gradient then
    reaches every parameter of the method, and no other."""
    model = PeftBackbone(base=BACKBONES[name], peft=dict(METHODS[method], blocks='last 2'), fast=fast)
    model.init_weights()
    off_initial_values(model)
    model.train()
    saved, before = [], []
    first = next(m for m in model.modules() if isinstance(m, PeftBlock) and len(m.peft))
    first.register_forward_pre_hook(lambda block, args: before.append((len(saved), args[0])))
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outputs = list(model(images()))
    (count, x), *_ = before
    assert count == 0 and not x.requires_grad and x.grad_fn is None
    assert saved or 'with_cp' in name, 'a checkpoint keeps its own'
    sum(out.square().sum() for out in outputs).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == method_names(model)


def test_the_gradients_under_mmengines_checkpoints():
    """``activation_checkpointing`` of a config, around blocks and around a stage of them: every gradient is as without,
    although the input of the first tuned block requires none."""
    gradients = []
    for modules in ([], ['stages.1.blocks.0', 'stages.2.blocks.0', 'stages.3.blocks.0']):
        torch.manual_seed(0)
        model = PeftBackbone(base=BACKBONES['swin'], peft=dict(MONA, blocks='last 2'))
        model.init_weights()
        model.eval()
        turn_on_activation_checkpointing(model, modules)
        sum(out.square().sum() for out in model(images())).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == method_names(model)
    assert_equal(gradients[1], gradients[0])


def kept_bytes(model, x, from_first: bool) -> int:
    """What a forward pass keeps, all of it held until the end: independent of the measurement."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    first = next(iter(find_host(model).blocks(model).values()))
    if from_first:
        handle = first.register_forward_pre_hook(lambda m, args: (args[0].clone().requires_grad_() * 1, *args[1:]))
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(x)
    if from_first:
        handle.remove()
    own = [*model.parameters(), *model.buffers()]
    own += [mask for m in model.modules() for mask in (getattr(m, '_masks', None) or (0, 0, []))[2]]
    held = {tensor.untyped_storage().data_ptr() for tensor in own}
    del outputs
    return sum(storage.nbytes() for address, storage in storages.items() if address not in held)


@pytest.mark.parametrize('fast', [True, False], ids=['fast', 'plain'])
@pytest.mark.parametrize('name', ['swin', 'vit', 'beit'])
def test_the_measurement_counts_what_is_kept(name, fast):
    model = PeftBackbone(base=BACKBONES[name], peft=dict(MONA, blocks='last 2'), fast=fast)
    model.train()
    random = torch.get_rng_state()
    measured = measure_activations(model, (64, 64))
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(block._forward_pre_hooks for block in find_host(model).blocks(model).values())
    x = torch.zeros(1, 3, 64, 64)
    alone = kept_bytes(model, x, from_first=False)
    assert (measured.kept, measured.kept_before) == (alone, 0)
    assert measured.spared == kept_bytes(model, x, from_first=True) - alone > 0
    assert measured.first == list(find_host(model).blocks(model))[-2]
    assert measured.text() == (
        f'kept for the backward pass, for one image of 64 x 64: {alone / 1e9:.3g} GB from {measured.first} on, nothing '
        f'before it; {measured.spared / 1e9:.3g} GB more are not kept'
    )


def test_the_measurement_under_checkpoints():
    """Of a block with an activation checkpoint its input is kept, (B, N, C), and between the blocks what always is."""
    plain, checkpointed = (
        measure_activations(PeftBackbone(base=BACKBONES[name], peft=dict(MONA, blocks='last 1')), (64, 64))
        for name in ('swin', 'swin-with_cp')
    )
    tokens = [(16 * 16, 24), (8 * 8, 48), (4 * 4, 96), (2 * 2, 192)]
    inputs = sum(4 * count * width for count, width in tokens[:1] * 2 + tokens[1:3])
    assert checkpointed.kept < plain.kept and inputs < checkpointed.spared < plain.spared / 2


def test_what_trains_before_the_blocks_is_kept():
    """A stem that trains makes everything behind it kept; norms at earlier outputs keep their inputs."""
    stem = PeftBackbone(base=BACKBONES['swin'], peft=dict(MONA, blocks='last 1'), trainable='patch_embed')
    measured = measure_activations(stem, (64, 64))
    assert measured.spared == 0 < measured.kept < measured.kept_before
    assert 'not kept' not in measured.text()
    norms = PeftBackbone(base=BACKBONES['swin'], peft=dict(MONA, blocks='last 1'), trainable=['norm0', 'norm1'])
    measured = measure_activations(norms, (64, 64))
    assert 0 < measured.kept_before < measured.spared
    last = measure_activations(PeftBackbone(base=BACKBONES['swin'], trainable='partial_1'), (64, 64))
    assert last.kept_before == 0 < last.spared


def test_nothing_is_measured_where_all_or_nothing_trains():
    assert measure_activations(PeftBackbone(base=BACKBONES['swin'], peft=MONA), (64, 64)) is None
    assert measure_activations(PeftBackbone(base=BACKBONES['swin'], trainable='fixed'), (64, 64)) is None
    assert measure_activations(torch.nn.Linear(3, 3)) is None
    with meta_device():
        model = PeftBackbone(base=BACKBONES['swin'], peft=dict(MONA, blocks='last 1'))
    assert measure_activations(model, (64, 64)) is None


def test_training_says_how_much_is_not_kept(make_runner):
    runner = make_runner(
        PeftBackbone(base=HOSTS['mmdet-swin'], peft=dict(MONA, blocks='last 1')),
        [dict(type='mona_mm.ParamFreezeHook')],
    )
    runner.train()
    assert re.search(
        r'method \(Mona\) (.*\n)+kept for the backward pass, for one image of 224 x 224: [\d.e-]+ GB from '
        r'stages\.3\.blocks\.0 on, nothing before it; [\d.e-]+ GB more are not kept',
        log_of(runner),
    )


PIPELINES = {
    'scale': ([dict(type='Resize', scale=(1333, 800), keep_ratio=True)], (800, 1333)),
    'crop': ([dict(type='RandomResize', scale=(2048, 512)), dict(type='RandomCrop', crop_size=(512, 256))], (512, 256)),
    'a-side': ([dict(type='ResizeEdge', scale=256), dict(type='CenterCrop', crop_size=224)], (224, 224)),
    'largest': ([dict(type='RandomChoiceResize', scales=[(480, 1333), (800, 1333), (640, 1333)])], (1333, 800)),
    'choice': (
        [dict(type='RandomChoice', transforms=[[dict(type='Resize', scale=(9, 8))], [dict(type='Resize', scale=7)]])],
        (8, 9),
    ),
    'not-padding': ([dict(type='Resize', scale=64), dict(type='Pad', size=(96, 96))], (64, 64)),
    'share-of-the-area': ([dict(type='Resize', scale=64), dict(type='X', scale=(0.1, 1.0))], (64, 64)),
    'none': ([dict(type='RandomFlip')], None),
}


@pytest.mark.parametrize(('pipeline', 'expected'), PIPELINES.values(), ids=PIPELINES)
def test_the_size_of_a_configs_images(pipeline, expected):
    inner = dict(type='RepeatDataset', dataset=dict(type='Any', pipeline=[dict(type='Resize', scale=4), *pipeline[:0]]))
    assert training_size(dict(train_dataloader=dict(dataset=dict(type='Any', pipeline=pipeline)))) == expected
    inner['pipeline'] = pipeline
    assert training_size(dict(train_dataloader=dict(dataset=inner))) == (expected or (4, 4))
    padded = dict(train_dataloader=dict(dataset=inner), model=dict(data_preprocessor=dict(pad_size_divisor=32)))
    assert training_size(padded) == tuple(-(-side // 32) * 32 for side in expected or (4, 4))
    padded['model']['data_preprocessor'] = dict(size=(518, 518))
    assert training_size(padded) == tuple(max(side, 518) for side in expected or (4, 4))


def test_count_params_measures(tool):
    config = str(ROOT / 'configs/demo/demo_mona_shapes.py')
    options = ['--cfg-options', 'model.backbone.peft.blocks=last 1']
    status, out, err = tool('count_params.py', config, '--activations', *options)
    assert status == 0 and 'for one image of 128 x 128' in out, err
    status, out, err = tool('count_params.py', config, '--activations')
    assert status == 0 and 'It trains from the first block on' in out, err


def mona_size(m: int, n: int) -> int:
    return (2 * n + 5) * m + n * n + 88 * n


SWIN = {'stages.0.blocks.0': 24, 'stages.0.blocks.1': 24, 'stages.1.blocks.0': 48, 'stages.2.blocks.0': 96} | {
    'stages.3.blocks.0': 192
}
COUNTED = {
    'mona': (
        dict(type='Mona', bottleneck={'stages.3': 16, 'stages.0.blocks.1': 12, 'default': 8}),
        2 * (mona_size(24, 8) + mona_size(24, 12) + mona_size(48, 8) + mona_size(96, 8) + mona_size(192, 16)),
    ),
    'mona-late': (
        dict(type='Mona', bottleneck={'stages.3': 16, 'stages.2': 12}, blocks='last 2'),
        2 * (mona_size(96, 12) + mona_size(192, 16)),
    ),
    'lora': (
        dict(type='LoRA', rank={'stages.0': 2, 'default': 4}, sites=['q', 'proj']),
        2 * (2 * 2 * 2 * 24 + 4 * 2 * (48 + 96 + 192)),
    ),
    'adapter': (
        dict(type='Adapter', bottleneck={'stages.{0,1}': 2, 'default': 3}),
        2 * sum(2 * m * n + m + n for m, n in ((24, 2), (24, 2), (48, 2), (96, 3), (192, 3))),
    ),
    'lorand': (
        dict(type='LoRand', inner={'stages.3': 8, 'default': 4}, branches={'stages.2': 3, 'default': 2}),
        2 * sum(2 * b * (m * r + r * r + m // 2 * r) + m // 2 + m
                for m, r, b in ((24, 4, 2), (24, 4, 2), (48, 4, 2), (96, 4, 3), (192, 8, 2))),
    ),
}  # fmt: skip


@pytest.mark.parametrize(('peft', 'expected'), COUNTED.values(), ids=COUNTED)
def test_counts_are_exact(peft, expected):
    model = PeftBackbone(base=HOSTS['mmdet-swin'], peft=peft)
    assert {path: len(b.norm1.weight) for path, b in find_host(model).blocks(model).items()} == SWIN
    assert count_trainable(model).trainable == sum(p.numel() for m in method_modules(model) for p in m.parameters())
    assert count_trainable(model).trainable == expected


def test_the_limits_count_the_chosen_blocks_alone():
    """A method may be at most four times as large as the blocks that it is in."""
    large = dict(type='Mona', bottleneck=192)
    PeftBackbone(base=HOSTS['mmdet-swin'], peft=dict(large, blocks='last 2'))
    with pytest.raises(ConfigError, match='more than 4 times as many parameters as the blocks that it tunes'):
        PeftBackbone(base=HOSTS['mmdet-swin'], peft=dict(large, blocks=[0]))


def test_modules_of_several_widths_fold():
    model = PeftBackbone(base=HOSTS['mmdet-swin'], peft=COUNTED['mona'][0]).eval()
    model.init_weights()
    off_initial_values(model)
    x = images()
    with torch.no_grad():
        expected = list(model(x))
        assert deploy(model) == 10
        assert_near(list(model(x)), expected, 1e-4)
    again = PeftBackbone(base=HOSTS['mmdet-swin'], peft=COUNTED['mona'][0], deploy=True).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert_equal(list(again(x)), list(model(x)))
