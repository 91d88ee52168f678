"""Rein: its formula, what its modules have in common, and the link to the queries of a decoder."""

import copy
import math
import pickle
from collections import Counter

import pytest
import torch
from conftest import HOSTS, ROOT
from declared_hosts import DECLARED
from helpers import assert_equal, assert_near, in_processes
from mmengine.model import BaseModel, ExponentialMovingAverage
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from safetensors import safe_open
from shipped import CONFIGS
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mona_mm
from mona_mm import PeftBackbone, count_trainable
from mona_mm.commands.cli import build_runner
from mona_mm.config.build import build_on_meta
from mona_mm.config.load import adapt_to_device, load_config
from mona_mm.errors import ConfigError
from mona_mm.hosts import method_modules, method_names
from mona_mm.methods import Rein
from mona_mm.methods.queries import LinkedQueries, check_linked, compute_queries
from mona_mm.nn.meta import meta_device
from mona_mm.reproduce.cells import method_of, task_of
from mona_mm.reproduce.logs import Log
from mona_mm.type_names import enter_scope

TINY = dict(embed_dims=24, num_layers=2, num_heads=2, feedforward_channels=48)
DINOV2 = dict(type='mona_mm.DINOv2', arch=TINY, img_size=56, num_registers=2)
LINKED = dict(type='Rein', num_tokens=6, rank=3, link=16)
SIZES = {'dinov2_s': ('small', 684_033, 388_609), 'dinov2_l': ('large', 2_990_081, 2_530_817)}


def off_initial_values(model: nn.Module) -> nn.Module:
    """Give all that trains values of the size of one, the scale among them, so that no term is lost in another."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    return model


def in_full(module: Rein) -> dict[str, torch.Tensor]:
    """All parameters that a module computes with, by name, in whichever module they are."""
    of_width, first = module._owners
    return {n: p for m in (first, of_width, module) for n, p in m.named_parameters()}


# The formula -----------------------------------------------------------------------------------------------------


def refined(f: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
    """The formula of one block, token by token."""
    tokens = p['a'] @ p['b']
    scores = torch.stack([(f * token).sum(-1) for token in tokens], -1) / math.sqrt(f.shape[-1])
    shares = scores.exp() / scores.exp().sum(-1, keepdim=True)
    change = torch.zeros_like(f)
    for k in range(1, len(tokens)):
        change = change + shares[..., k, None] * (p['value.weight'] @ tokens[k] + p['value.bias'])
    return f + p['scale'] * ((change + f) @ p['update.weight'].T + p['update.bias'])


def linked(blocks: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The formula of the queries."""
    of_blocks = [p['a'] @ p['b'] @ p['query.weight'].T + p['query.bias'] for p in blocks]
    largest, mean = of_blocks[0], sum(of_blocks) / len(of_blocks)
    for queries in of_blocks[1:]:
        largest = torch.where(queries > largest, queries, largest)
    merge = blocks[0]
    return torch.cat((largest, mean, of_blocks[-1]), 1) @ merge['merge.weight'].T + merge['merge.bias']


@pytest.mark.parametrize('extra', [0, 3], ids=['patches', 'class and registers'])
def test_the_formula(extra):
    """Three blocks of two widths: outputs, queries and the gradient of every input and parameter, those in common
    included, are those of the formula written down again; tokens that are no patches pass through unchanged."""
    torch.manual_seed(3)
    widths = (12, 12, 20)
    modules = [Rein(width, num_tokens=5, rank=2, scale=0.7, link=8) for width in widths]
    Rein.share({f'blocks.{i}': {'post_ffn': module} for i, module in enumerate(modules)})
    model = off_initial_values(nn.ModuleList(modules).double())
    inputs = [torch.randn(2, extra + 12, width, dtype=torch.float64, requires_grad=True) for width in widths]
    directions = [torch.randn_like(x) for x in inputs]
    named = dict(model.named_parameters())
    assert len(named) == 3 * 2 + 2 * 3 * 2 + 2 + 1  # a and b; value, update and query of each width; merge; scale

    def gradients(outs: list[torch.Tensor], queries: torch.Tensor) -> list[torch.Tensor]:
        loss = sum((out * d).sum() for out, d in zip(outs, directions, strict=True)) + queries.square().sum()
        return list(torch.autograd.grad(loss, [*inputs, *named.values()]))

    outs = [module(x, (3, 4)) for module, x in zip(modules, inputs, strict=True)]
    queries = Rein.queries(modules)
    values = [in_full(module) for module in modules]
    expected = [torch.cat((x[:, :extra], refined(x[:, extra:], p)), 1) for x, p in zip(inputs, values, strict=True)]
    assert_near(outs, expected, 1e-12)
    assert_near(queries, linked(values), 1e-12)
    assert_near(gradients(outs, queries), gradients(expected, linked(values)), 1e-12)
    for out, x in zip(outs, inputs, strict=True):
        assert torch.equal(out[:, :extra], x[:, :extra])


def test_in_a_backbone():
    """In DINOv2 every block's features are refined behind the class token and the registers."""
    model = off_initial_values(PeftBackbone(base=DINOV2, peft=dict(LINKED, link=None))).double().eval()
    seen = []
    for module in method_modules(model):
        module.register_forward_hook(lambda m, args, out: seen.append((m, args[0], args[1], out)))
    model(torch.randn(2, 3, 56, 70, dtype=torch.float64))
    assert len(seen) == 2
    for module, x, hw, out in seen:
        assert x.shape == (2, 1 + 2 + 20, 24) and tuple(hw) == (4, 5)
        assert torch.equal(out[:, :3], x[:, :3])
        assert_near(out[:, 3:], refined(x[:, 3:], in_full(module)), 1e-12)


def test_it_begins_near_the_base():
    """With its initial values a module changes its input by about a thousandth; its tokens are small."""
    torch.manual_seed(0)
    for width, std in ((384, 0.037), (1024, 0.023)):
        module, x = Rein(width), torch.randn(2, 100, width)
        assert 1e-4 < ((module(x, (10, 10)) - x).norm() / x.norm()).item() < 2e-3
        assert module.tokens.std().item() == pytest.approx(std, rel=0.1)
        assert module.scale.item() == pytest.approx(1e-3)


# Counts and what is in common ------------------------------------------------------------------------------------


@pytest.mark.parametrize('size', SIZES)
def test_counts(size):
    """The published numbers with the link to queries of width 256, and what is left of them without it."""
    arch, with_link, without = SIZES[size]
    base = dict(type='mona_mm.DINOv2', arch=arch)
    for link, expected in ((256, with_link), (None, without)):
        with meta_device():
            model = PeftBackbone(base=base, peft=dict(type='Rein', link=link))
        assert count_trainable(model).backbone_trainable == expected
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


@pytest.mark.parametrize('clone', [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_blocks_of_one_width_have_one_projection(clone):
    """Four widths in a Swin: tokens are each block's own, projections each width's, scale and merge the backbone's; in
    a copy, and after the initial values were given anew, too."""
    model = clone(PeftBackbone(base=HOSTS['mmdet-swin'], peft=LINKED))
    model.init_weights()
    modules = method_modules(model)
    assert [module.b.shape[1] for module in modules] == [24, 24, 48, 96, 192]
    of_width = [f'{layer}.{name}' for layer in ('query', 'update', 'value') for name in ('bias', 'weight')]
    expected = dict(a=5, b=5, scale=1) | {'merge.weight': 1, 'merge.bias': 1} | dict.fromkeys(of_width, 4)
    assert Counter(name.partition('.post_ffn.')[2] for name in method_names(model)) == expected
    first = modules[0]
    assert [module._owners[0] is first for module in modules] == [True, True, False, False, False]
    assert all(module._owners[1] is first for module in modules)


def test_a_delta_holds_what_is_in_common_once(tmp_path):
    """And gives it back, to all blocks that have it, on the base that it was trained on."""
    torch.save(MODELS.build(DINOV2).state_dict(), tmp_path / 'base.pth')
    base = dict(DINOV2, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth')))
    source, target = (PeftBackbone(base=base, peft=LINKED) for _ in range(2))
    source.init_weights()
    off_initial_values(source)
    mona_mm.save_delta(source, tmp_path / 'a.delta.safetensors')
    with safe_open(tmp_path / 'a.delta.safetensors', 'pt') as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert stored == count_trainable(source).trainable == 2 * 3 * (6 + 24) + 2 * 24 * 25 + 16 * 25 + 16 * 49 + 1
    mona_mm.load_delta(target, tmp_path / 'a.delta.safetensors')
    x = torch.randn(1, 3, 56, 56)
    assert_equal([*source.eval()(x), compute_queries(source)], [*target.eval()(x), compute_queries(target)])


@pytest.mark.parametrize('host', ['mmdet-swin', 'mmpretrain-vit'])
def test_checkpointed_blocks_have_the_same_gradients(host):
    """Activation checkpoints compute a block again, with parameters that other blocks have as well."""
    gradients = []
    for with_cp in (False, True):
        torch.manual_seed(1)
        base = dict(HOSTS[host], drop_path_rate=0.0, **(dict(with_cp=with_cp) if 'swin' in host else {}))
        model = off_initial_values(PeftBackbone(base=base, peft=dict(LINKED, link=None)))
        model.train()
        if with_cp and 'vit' in host:
            turn_on_activation_checkpointing(model, ['layers.0', 'layers.2'])
        x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
        sum(out.square().mean() for out in torch.utils._pytree.tree_leaves(model(x))).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert_near(gradients[1], gradients[0])


def test_a_low_precision_keeps_the_gradient_of_the_scale():
    """Under autocast in bfloat16 the sum over all tokens that is the gradient of the scale is near that in float32, and
    queries are in float32 as an embedding would be."""
    gradients = []
    model = PeftBackbone(base=DINOV2, peft=LINKED)
    model.init_weights()
    x = torch.randn(2, 3, 56, 56)
    for enabled in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            (out,), queries = model(x), compute_queries(model)
        assert queries.dtype == torch.float32
        model.zero_grad()
        (out.float() * torch.linspace(-1, 1, 24)[:, None, None]).sum().backward()
        gradients.append(model.layers[0].peft.post_ffn.scale.grad)
    assert gradients[1].dtype == torch.float32
    assert_near(gradients[1], gradients[0], 0.05)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(num_tokens=1), 'num_tokens=1 must be a whole number of at least 2'),
        (dict(rank=0), 'rank=0 must be a whole number of at least 1'),
        (dict(rank=25), 'rank=25 must be at most 24'),
        (dict(scale=0), 'scale=0 must be a number above 0'),
        (dict(link=0), 'link=0 must be a whole number of at least 1 or None'),
        (dict(sites=['ffn_out']), 'its sites are post_attn, post_ffn'),
    ],
)
def test_options(options, message):
    with pytest.raises(ConfigError, match=message):
        PeftBackbone(base=DINOV2, peft=dict(type='Rein', **options))


def test_a_host_without_a_known_grid_is_refused():
    """Where patches cannot be told from other tokens, the config is refused, not the first image."""
    with pytest.raises(ConfigError, match='Rein reads the grid of the tokens'):
        PeftBackbone(base=DECLARED['mmpretrain-tnt'], peft=dict(type='Rein'))


# The link --------------------------------------------------------------------------------------------------------


def segmentor_config(size: str = 's', **peft):
    """The shipped config with the link, in small: a DINOv2 of two layers, a Mask2Former of six queries of width 16."""
    cfg = load_config(str(CONFIGS[f'rein_mask2former_dinov2_{size}_cityscapes']))
    adapt_to_device(cfg)
    model = cfg.model.base
    model.backbone.base = dict(DINOV2, out_indices=(0, 1))
    model.backbone.peft.update(LINKED, **peft)
    model.data_preprocessor.size = (56, 56)
    model.neck.update(in_channels=24, out_channels=16, scales=(2, 1))
    head = model.decode_head
    head.update(in_channels=[16] * 2, feat_channels=16, out_channels=16, num_classes=3, num_queries=6)
    head.update(num_transformer_feat_level=1)
    head.loss_cls.class_weight = [1.0] * 3 + [0.1]
    head.train_cfg.num_points = 64
    head.positional_encoding.num_feats = head.pixel_decoder.positional_encoding.num_feats = 8
    head.pixel_decoder.update(num_outs=1)
    head.pixel_decoder.norm_cfg.num_groups = 4
    head.pixel_decoder.encoder.num_layers, head.transformer_decoder.num_layers = 1, 2
    for layer in (head.pixel_decoder.encoder.layer_cfg, head.transformer_decoder.layer_cfg):
        for part in layer.values():
            part.embed_dims = 16
            if 'num_heads' in part:
                part.num_heads = 2
            if 'num_levels' in part:
                part.num_levels = 1
            if 'feedforward_channels' in part:
                part.feedforward_channels = 32
    return cfg


def segmentor(**peft) -> BaseModel:
    cfg = segmentor_config(**peft)
    enter_scope(cfg)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    return model


@DATASETS.register_module()
class TwoFields(torch.utils.data.Dataset):
    """Images whose left half is dark and of the first class, the right half bright and of the second."""

    METAINFO = metainfo = dict(classes=('left', 'right', 'none'))

    def __len__(self):
        return 4

    def __getitem__(self, i):
        noise = torch.randn(3, 56, 56, generator=torch.Generator().manual_seed(i)) * 20
        bright = (torch.arange(56) >= 28).float().expand(3, 56, 56) * 160 + 40
        sample = SegDataSample(metainfo=dict(img_shape=(56, 56), ori_shape=(56, 56), pad_shape=(56, 56)))
        sample.gt_sem_seg = PixelData(data=(torch.arange(56) >= 28).long().expand(1, 56, 56))
        return dict(inputs=(bright + noise).clamp(0, 255).byte(), data_samples=sample)


def batch(model: BaseModel, count: int = 2) -> dict:
    samples = [TwoFields()[i] for i in range(count)]
    return model.data_preprocessor({key: [s[key] for s in samples] for key in ('inputs', 'data_samples')}, True)


def losses_of(model: BaseModel) -> torch.Tensor:
    torch.manual_seed(7)  # points at which masks are compared are drawn
    return model.parse_losses(model(**batch(model), mode='loss'))[0]


def test_the_decoder_reads_the_queries():
    """Its embeddings of positions are gone, names and class of the model are as without the link, every parameter of
    the link gets a gradient through the decoder alone, and what the decoder computes changes with the tokens."""
    model = segmentor()
    stock = segmentor_config().model.base
    stock.backbone = stock.backbone.base
    stock = MODELS.build(stock)
    assert type(model) is type(stock) and type(model.decode_head) is type(stock.decode_head)
    names, given = set(model.state_dict()), set(stock.state_dict())
    assert given - names == {'decode_head.query_embed.weight'}
    assert names - given == method_names(model)
    assert torch.equal(model.decode_head.query_embed(torch.tensor([1, 4])), compute_queries(model.backbone)[[1, 4]])
    model.train()
    losses_of(model).backward()
    assert {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None} == set()
    head_alone = [p for name, p in model.backbone.named_parameters() if '.query.' in name or '.merge.' in name]
    assert len(head_alone) == 4 and all(p.grad.abs().sum() > 0 for p in head_alone)
    before = losses_of(model)
    with torch.no_grad():
        model.backbone.layers[0].peft.post_ffn.merge.bias.add_(torch.randn(16))
    assert not torch.equal(losses_of(model), before)


COPIES = {
    'deepcopy': copy.deepcopy,
    'pickle': lambda model: pickle.loads(pickle.dumps(model)),
    'average': lambda model: ExponentialMovingAverage(model, momentum=0.5).module,
}


@pytest.mark.parametrize('clone', COPIES.values(), ids=COPIES)
def test_a_copy_reads_its_own_tokens(clone):
    """Of a copy of the whole model the decoder reads the backbone in it, and names and sharing stay."""
    model = segmentor()
    expected = losses_of(model).detach()
    twin = clone(model)
    assert twin.state_dict().keys() == model.state_dict().keys()
    assert twin.decode_head.query_embed.backbone is twin.backbone is not model.backbone
    assert torch.equal(losses_of(twin), expected)
    with torch.no_grad():
        for p in twin.backbone.parameters():
            p.zero_()
    assert compute_queries(twin.backbone).eq(0).all() and torch.equal(losses_of(model), expected)
    check_linked(twin)


def run(folder, iterations: int, resume: str | None = None, hooks=()) -> Runner:
    cfg = segmentor_config()
    cfg.work_dir = str(folder)
    loader = dict(batch_size=2, num_workers=0, dataset=dict(type='TwoFields'))
    cfg.train_dataloader = dict(loader, sampler=dict(type='InfiniteSampler', shuffle=True))
    for key in ('val_dataloader', 'val_cfg', 'val_evaluator', 'test_dataloader', 'test_cfg', 'test_evaluator'):
        cfg.pop(key)
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations)
    cfg.param_scheduler = []
    cfg.optim_wrapper.optimizer.lr = 3e-3
    cfg.default_hooks.checkpoint = dict(type='mona_mm.SafeCheckpointHook', by_epoch=False, interval=3)
    cfg.default_hooks.pop('visualization')
    cfg.pop('visualizer')
    cfg.custom_hooks = [*cfg.custom_hooks, *hooks]
    cfg.load_from, cfg.resume = resume, resume is not None
    cfg.log_level = 'ERROR'
    cfg.experiment_name = f'{folder.name}-{iterations}-{resume}'
    runner = build_runner(cfg)
    runner.train()
    return runner


def test_a_resumed_run_equals_an_undisturbed_one(tmp_path):
    """Through mmengine's Runner with all hooks of the config and an average: weights, bit for bit; the delta of the end
    makes of a fresh model the one that was trained."""
    hooks = [dict(type='EMAHook')]
    whole = run(tmp_path / 'whole', 6, hooks=hooks).model
    run(tmp_path / 'first', 3, hooks=hooks)
    resumed = run(tmp_path / 'second', 6, str(tmp_path / 'first/iter_3.pth'), hooks).model
    assert_equal(resumed.state_dict(), whole.state_dict())
    fresh = segmentor()
    fresh.backbone.load_state_dict(
        {name: t for name, t in whole.backbone.state_dict().items() if '.peft.' not in name}, strict=False
    )
    state = torch.load(tmp_path / 'whole/iter_6.pth', weights_only=False)['state_dict']
    mona_mm.load_delta(fresh, tmp_path / 'whole/iter_6.delta.safetensors')
    assert_equal(fresh.state_dict(), state)


def test_a_link_that_nobody_reads_is_an_error(tmp_path, make_runner):
    """Before the first iteration, whether the decoder has queries or not; and none if nothing of the method trains."""
    backbone = PeftBackbone(base=HOSTS['mmdet-swin'], peft=LINKED)
    runner = make_runner(backbone, [dict(type='mona_mm.ParamFreezeHook')])
    with pytest.raises(ConfigError, match=r"backbone: Rein has link=16, and no decoder reads.*'mona_mm.LinkedModel'"):
        runner.train()
    assert runner.iter == 0
    check_linked(backbone.requires_grad_(False))


def test_the_config_of_a_link_is_checked():
    """A backbone that computes no queries, or two; another number or width of queries; no embedding at the path."""
    cfg = segmentor_config().model
    enter_scope(segmentor_config())
    for change, message in (
        (lambda m: m.backbone.peft.pop('link'), r"none does.*dict\(type='Rein', link=256\)"),
        (
            lambda m: m.backbone.update(peft=[dict(LINKED, blocks=':1'), dict(LINKED, blocks='1:')]),
            'several methods of RegisterViT compute queries for a decoder: Rein, Rein 2',
        ),
        (lambda m: m.backbone.peft.update(link=32), r'6 queries of width 16, and Rein makes 6 of width 32.*link=16'),
        (lambda m: m.decode_head.update(num_queries=9), r'9 queries of width 16.*num_tokens=9'),
    ):
        changed = copy.deepcopy(cfg)
        change(changed.base)
        with pytest.raises(ConfigError, match=message):
            MODELS.build(changed)
    with pytest.raises(ConfigError, match=r"queries='query_embed' is in .*decode_head.query_embed, .*query_feat"):
        MODELS.build(dict(cfg, queries='query_embed'))
    model = MODELS.build(dict(cfg, queries='decode_head.query_feat'))
    assert isinstance(model.decode_head.query_feat, LinkedQueries)
    assert isinstance(model.decode_head.query_embed, nn.Embedding)


def test_within_other_wrappers():
    """Freezing around it, and a teacher and its student, each of which reads its own tokens."""
    cfg = segmentor_config()
    enter_scope(cfg)
    frozen = MODELS.build(dict(type='mona_mm.FrozenModel', base=cfg.model, trainable=['neck']))
    trains = {name for name, p in frozen.named_parameters() if p.requires_grad}
    assert trains == {name for name, _ in frozen.named_parameters() if '.peft.' in name or name.startswith('neck.')}
    check_linked(frozen)
    with pytest.raises(ConfigError, match='within the PeftModel or FrozenModel'):
        MODELS.build(dict(cfg.model, base=dict(type='mona_mm.FrozenModel', base=cfg.model.base, trainable=['neck'])))
    student, teacher = (MODELS.build(cfg.model) for _ in range(2))
    teacher.requires_grad_(False)
    both = nn.ModuleDict(dict(student=student, teacher=teacher))
    check_linked(both)
    for each in both.values():
        assert each.decode_head.query_embed.backbone is each.backbone


def test_tokens_behind_the_last_output_train_through_the_link():
    """They reach no output of the backbone, but the decoder; without the link they are frozen."""
    base = dict(HOSTS['mmpretrain-vit'], out_indices=(0,))
    frozen = PeftBackbone(base=base, peft=dict(LINKED, link=None))
    assert not frozen.layers[2].peft.post_ffn.a.requires_grad
    model = PeftBackbone(base=base, peft=LINKED)
    assert all(p.requires_grad for name, p in model.named_parameters() if '.peft.' in name)
    (sum(out.sum() for out in torch.utils._pytree.tree_leaves(model(torch.randn(1, 3, 64, 64))))
     + compute_queries(model).square().sum()).backward()  # fmt: skip
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_in_a_detector():
    """mmdet's Mask2Former has its queries elsewhere, by the same name."""
    cfg = segmentor_config()
    enter_scope(cfg)
    head = copy.deepcopy(cfg.model.base.decode_head)
    head.pop('align_corners')
    head.update(type='mmdet.Mask2FormerHead', num_things_classes=2, num_stuff_classes=1)
    head.pop('num_classes')
    train_cfg = head.pop('train_cfg')
    model = dict(type='mmdet.Mask2Former', backbone=cfg.model.base.backbone, neck=cfg.model.base.neck)
    model.update(
        panoptic_head=head,
        panoptic_fusion_head=dict(type='mmdet.MaskFormerFusionHead', num_things_classes=2, num_stuff_classes=1),
        train_cfg=train_cfg,
        test_cfg=dict(),
    )
    model = MODELS.build(dict(type='mona_mm.LinkedModel', base=model))
    assert model.panoptic_head.query_embed.backbone is model.backbone
    x = model.extract_feat(torch.randn(1, 3, 56, 56))
    classes, _ = model.panoptic_head(x, [None])
    classes[-1].sum().backward()
    assert model.backbone.layers[0].peft.post_ffn.query.weight.grad.abs().sum() > 0


# Two processes -----------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """A backbone and a decoder that compares its queries with every pixel, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.backbone = off_initial_values(PeftBackbone(base=DINOV2, peft=LINKED))
        self.project = nn.Conv2d(24, 16, 1)
        self.queries = LinkedQueries(self.backbone)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (features,) = self.backbone(x)
        return torch.einsum('qc,bchw->bqhw', self.queries.weight, self.project(features)).tanh().square().mean()


def trained_for_two_steps(model: nn.Module, x: torch.Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()


def images_of_both() -> torch.Tensor:
    return torch.randn(4, 3, 56, 56, dtype=torch.float64, generator=torch.Generator().manual_seed(8))


def train_a_part(file: str) -> None:
    """One of two processes: two steps with half of the images. DDP waits for a parameter without a gradient, and says
    so at the second step."""
    torch.distributed.init_process_group('gloo')
    model, rank = Decoder(), torch.distributed.get_rank()
    trained_for_two_steps(DistributedDataParallel(model), images_of_both()[2 * rank : 2 * rank + 2])
    torch.save(model.state_dict(), f'{file}.{rank}')
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    """What blocks have in common, and the link, has the same values in both, those of one process with all images."""
    in_processes(2, tmp_path, train_a_part, str(tmp_path / 'state'))
    model, start = Decoder(), Decoder().state_dict()
    trained_for_two_steps(model, images_of_both())
    expected = model.state_dict()
    moved = {name for name, t in expected.items() if not torch.equal(t, start[name])}
    assert moved == {name for name in expected if '.peft.' in name or name.startswith('project.')}
    first, second = (torch.load(f'{tmp_path}/state.{rank}', weights_only=True) for rank in range(2))
    assert_equal(first, second)
    assert_near(first, expected, 1e-10)


# Configs -----------------------------------------------------------------------------------------------------------

CONFIGS_OF_REIN = sorted(name for name, path in CONFIGS.items() if path.parent.name == 'rein')


@pytest.mark.parametrize(
    'name', [pytest.param(n, marks=[pytest.mark.slow] * ('cascade' in n)) for n in CONFIGS_OF_REIN]
)
def test_configs(name):
    """At full size: what trains is what the formula says, no file has more than 15 lines, and each stands on the task's
    own settings."""
    assert len((ROOT / f'configs/rein/{name}.py').read_text().splitlines()) <= 15
    cfg = load_config(str(CONFIGS[name]))
    adapt_to_device(cfg)
    model = build_on_meta(cfg)
    widths = {'swin_b': [128] * 2 + [256] * 2 + [512] * 18 + [1024] * 2, 'dinov2_b': [768] * 12}
    widths['swin_l'] = [width * 3 // 2 for width in widths['swin_b']]
    widths |= {'dinov2_s': [384] * 12, 'dinov2_l': [1024] * 24}
    of_blocks = next(row for size, row in widths.items() if size in name)
    expected = sum(16 * (100 + m) for m in of_blocks) + sum(2 * m * (m + 1) for m in set(of_blocks)) + 1
    if 'mask2former' in name:
        expected += sum(256 * (m + 1) for m in set(of_blocks)) + 256 * (3 * 256 + 1)
        check_linked(model)
    assert count_trainable(model).backbone_trainable == expected


def test_a_linked_run_is_recognised():
    """Its cell in the published tables is read from its config, by the size of the backbone and the images."""
    for size in 'lbs':
        name = f'rein_mask2former_dinov2_{size}_cityscapes'
        cfg = load_config(str(CONFIGS[name])).to_dict()
        assert task_of(cfg) == f'dinov2_{size}_cityscapes'
        assert method_of(cfg, Log(), {}) == 'rein'
    cfg['train_dataloader']['dataset']['data_root'] = 'data/cityscapes/'
    assert task_of(cfg) is None
