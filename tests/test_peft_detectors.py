"""PeftModel around whole detectors: LoRA in decoders, deformable attention, necks and convolutional backbones."""

import copy
import json
import pickle
from pathlib import Path

import mmdet
import pytest
import torch
from conftest import HOSTS, ROOT, SWIN
from helpers import assert_equal, assert_near
from mmdet.structures import DetDataSample
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.model import BaseModule
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from small_models import IN_BFLOAT16  # noqa: F401  registers SmallModel
from torch import nn

import mona_mm
from mona_mm import FrozenModel, PeftModel, count_trainable, load_delta, save_delta
from mona_mm.checkpoint.delta_file import read_delta
from mona_mm.config.build import build_on_meta
from mona_mm.config.load import load_config
from mona_mm.errors import CheckpointMismatchError, ConfigError
from mona_mm.frozen.rules import check_trainable

CONFIGS = Path(mmdet.__file__).parent / '.mim/configs'
LORA = dict(type='LoRA', rank=2)


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope('mmdet')


def model_config(file: str, **changes) -> Config:
    """The model of one of mmdet's configs, with a narrow ResNet-18 and whatever else is changed."""
    cfg = Config(dict(model=Config.fromfile(str(CONFIGS / file)).model))
    narrow = {'model.backbone.depth': 18, 'model.backbone.base_channels': 8, 'model.backbone.init_cfg': None}
    cfg.merge_from_dict({**narrow, **{f'model.{key.replace("__", ".")}': value for key, value in changes.items()}})
    return cfg.model


def deformable(file: str, **changes) -> Config:
    """A detector of the family of Deformable DETR. Its queries are 256 wide, as its positions are."""
    return model_config(
        file,
        num_queries=6,
        neck__in_channels=[16, 32, 64],
        encoder__num_layers=1,
        decoder__num_layers=2,
        encoder__layer_cfg__ffn_cfg__feedforward_channels=32,
        decoder__layer_cfg__ffn_cfg__feedforward_channels=32,
        bbox_head__num_classes=4,
        test_cfg=dict(max_per_img=5),
        **changes,
    )


def mask2former() -> Config:
    cfg = model_config(
        'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
        panoptic_head__in_channels=[8, 16, 32, 64],
        panoptic_head__num_queries=5,
        panoptic_head__num_things_classes=4,
        panoptic_head__pixel_decoder__encoder__num_layers=1,
        panoptic_head__transformer_decoder__num_layers=3,
        panoptic_head__loss_cls__class_weight=[1.0] * 4 + [0.1],
        panoptic_fusion_head__num_things_classes=4,
        data_preprocessor__batch_augments=None,
        train_cfg__num_points=64,
        test_cfg__max_per_image=5,
    )
    text = Config(dict(model=cfg)).dump().replace('256', '32').replace('num_feats=128', 'num_feats=16')
    return Config.fromstring(text, '.py').model


DETECTORS = {
    'DINO': (
        lambda: deformable('dino/dino-4scale_r50_8xb2-12e_coco.py', dn_cfg__group_cfg__num_dn_queries=4),
        'decoder.layers.*.{self_attn,cross_attn}.**',
        ['in_proj_weight', 'out_proj', 'sampling_offsets', 'attention_weights', 'value_proj', 'output_proj'],
        'encoder.**.{value,output}_proj',
        'bbox_head',
    ),
    'Mask2Former': (
        mask2former,
        'panoptic_head.transformer_decoder.layers.*.{self_attn,cross_attn}.**',
        ['in_proj_weight', 'out_proj', 'in_proj_weight', 'out_proj'],
        'panoptic_head.pixel_decoder.{encoder.**.self_attn.*,**.conv}',
        'panoptic_head.cls_embed',
    ),
    'Deformable DETR': (
        lambda: deformable('deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'),
        'decoder.layers.*.{self_attn,cross_attn}.**',
        ['in_proj_weight', 'out_proj', 'sampling_offsets', 'attention_weights', 'value_proj', 'output_proj'],
        'neck.**.conv',
        'bbox_head',
    ),
}


def data(model, seed=0) -> dict:
    torch.manual_seed(seed)
    inputs = demo_mm_inputs(2, [(3, 64, 64), (3, 64, 48)], num_classes=4, with_mask='panoptic_head' in dir(model))
    return model.data_preprocessor(inputs, True)


def losses(model) -> torch.Tensor:
    torch.manual_seed(1)  # of the denoising queries and of the sampled points
    return model.parse_losses(model(**data(model), mode='loss'))[0]


def raw_outputs(model) -> list[torch.Tensor]:
    """The outputs of the heads, before the predictions are chosen, in evaluation."""
    model.eval()
    parameter = next(model.parameters())
    inputs = data(model)
    found: list[torch.Tensor] = []

    def collect(node):
        if isinstance(node, torch.Tensor):
            found.append(node)
        for value in node if isinstance(node, list | tuple) else ():
            collect(value)

    with torch.no_grad():
        if hasattr(model, 'panoptic_head'):
            features = model.extract_feat(inputs['inputs'].to(parameter.dtype))
            collect(model.panoptic_head(features, inputs['data_samples']))
        else:
            collect(model(inputs['inputs'].to(parameter.dtype), inputs['data_samples'], mode='tensor'))
    assert found
    return found


def off_zero(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model


@pytest.mark.parametrize('name', DETECTORS)
def test_a_decoder(name, tmp_path):
    """LoRA in a decoder and beside convolutions or deformable attention: at its start the detector is the stock one bit
    for bit, with its class and names; a step gives gradients to the method and what ``trainable`` says, and to nothing
    else; a delta comes back, and so do copies; merged, it is a stock detector that predicts the same."""
    build, decoder, ends, other, trains = DETECTORS[name]
    cfg = build()
    targets = [dict(LORA, path=decoder), dict(LORA, path=other)]

    def peft():
        return PeftModel(base=copy.deepcopy(cfg), targets=targets, trainable=trains)

    torch.manual_seed(0)
    stock, model = MODELS.build(copy.deepcopy(cfg)), peft()
    model.init_weights()  # the stock one's own fills every matrix of a decoder with random values
    assert all((p == 0).all() for n, p in model.named_parameters() if n.endswith('up.weight'))
    stock.load_state_dict({n: t for n, t in model.state_dict().items() if '.peft.' not in n})
    assert type(model) is type(stock)
    stock.requires_grad_(False)  # attention of weights that train is computed by another kernel
    assert_equal(raw_outputs(model), raw_outputs(stock))

    layers = model.peft_record.targets[0].layers
    count = len(layers) // len(ends)
    assert [path.rpartition('.')[2] for path in layers] == ends * count and count in (2, 3)
    model.train()
    losses(model).backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None}
    assert reached == {n for n, _ in model.named_parameters() if '.peft.' in n or n.startswith(f'{trains}.')}
    check_trainable(model)

    off_zero(model)
    save_delta(model, tmp_path / 'a.delta.safetensors')
    again = peft()
    again.load_state_dict(stock.state_dict(), strict=False)
    load_delta(again, tmp_path / 'a.delta.safetensors')
    expected = raw_outputs(model)
    assert_equal(raw_outputs(again), expected)
    assert_equal(raw_outputs(pickle.loads(pickle.dumps(model))), expected)
    assert_equal(raw_outputs(copy.deepcopy(model)), expected)

    expected = raw_outputs(model.double())
    mona_mm.merge(model)
    assert_near(raw_outputs(model), expected, 1e-9)
    stock.double().load_state_dict(model.state_dict())
    assert_near(raw_outputs(stock), expected, 1e-9)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]


@MODELS.register_module()
class NoLanguage(BaseModule):
    """In place of a language model, which needs the hub."""

    def __init__(self, **_):
        super().__init__()
        self.language_backbone = nn.Module()
        self.language_backbone.body = nn.Module()
        self.language_backbone.body.language_dim = 8


def test_the_layers_of_grounding_dino():
    """Its decoder, its fusion of image and text, and its encoders are reached by their paths."""
    cfg = Config.fromfile(str(CONFIGS / 'grounding_dino/grounding_dino_swin-t_pretrain_obj365_goldg_cap4m.py')).model
    cfg.update(language_model=dict(type='NoLanguage', name=''), backbone=dict(SWIN, type='SwinTransformer'))
    cfg.encoder.num_layers = cfg.decoder.num_layers = 1
    cfg.num_queries = 6
    targets = [
        dict(LORA, path='decoder.layers.*.cross_attn_text.**', slices=['q', 'v']),
        dict(LORA, path='encoder.fusion_layers.**'),
        dict(LORA, path='encoder.layers.*.self_attn.*'),
        dict(LORA, path='text_feat_map'),
    ]
    model = PeftModel(base=cfg, targets=targets)
    assert model.peft_record.targets[0].layers == (
        'decoder.layers.0.cross_attn_text.attn.in_proj_weight',
        'decoder.layers.0.cross_attn_text.attn.out_proj',
    )
    assert list(model.decoder.layers[0].cross_attn_text.attn.peft) == ['q', 'v', 'out_proj']
    assert len(model.peft_record.targets[1].layers) == 6 and len(model.peft_record.targets[2].layers) == 4
    init_default_scope('mmdet')

    def transformed():
        """The queries after the decoder, from features and a text of three tokens."""
        generator = torch.Generator().manual_seed(3)
        dtype = model.text_feat_map.weight.dtype
        features = [torch.randn(1, 256, side, side, generator=generator).to(dtype) for side in (8, 4, 2, 1)]
        text = dict(
            embedded=model.text_feat_map(torch.randn(1, 3, 8, generator=generator).to(dtype)),
            masks=torch.ones(1, 3, 3, dtype=torch.bool),
            position_ids=torch.arange(3)[None],
            text_token_mask=torch.ones(1, 3, dtype=torch.bool),
        )
        sample = DetDataSample(metainfo=dict(batch_input_shape=(64, 64), img_shape=(64, 64)))
        return model.forward_transformer(features, text, [sample])['hidden_states']

    model.init_weights()
    off_zero(model).eval()
    transformed().square().sum().backward()
    assert all((p.grad is not None) == ('.peft.' in n) for n, p in model.named_parameters())
    model.double()
    expected = transformed().detach()
    mona_mm.merge(model)
    assert_near(transformed().detach(), expected, 1e-9)


def test_mona_in_the_backbone_and_lora_in_the_decoder(tmp_path):
    """A PeftBackbone within the base keeps its Mona: both train, both are in the table and in the delta. Without Mona's
    stock form there is no merging, and the file that holds all says so."""
    cfg = deformable('dino/dino-4scale_r50_8xb2-12e_coco.py', dn_cfg__group_cfg__num_dn_queries=4)
    cfg.backbone = dict(type='mona_mm.PeftBackbone', base={**HOSTS['mmdet-swin'], 'out_indices': (1, 2, 3)},
                        peft=dict(type='Mona', bottleneck=4), trainable='norm')  # fmt: skip
    cfg.neck.in_channels = [48, 96, 192]
    targets = [dict(LORA, path='decoder.**.attn.**')]

    def build():
        return PeftModel(base=copy.deepcopy(cfg), targets=targets)

    model = build()
    model.init_weights()
    count = count_trainable(model)
    parts = {part.part: (part.trainable, part.total) for part in count.parts}
    lora = 2 * 2 * (256 + 3 * 256 + 256 + 256)
    mona = sum(p.numel() for n, p in model.backbone.named_parameters() if '.peft.' in n)
    norms = parts['backbone base'][0]
    assert parts['method (Mona)'] == (mona, mona) and norms > 0
    assert parts['method (LoRA: decoder.**.attn.**)'] == (lora, lora)
    assert count.method == 'Mona+LoRA' and count.trainable == lora + mona + norms
    assert count.backbone_trainable == mona + norms
    check_trainable(model)
    model.train()
    losses(model).backward()
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trains

    off_zero(model)
    save_delta(model, tmp_path / 'a.delta.safetensors')
    delta = read_delta(tmp_path / 'a.delta.safetensors')
    assert set(delta.tensors) == trains
    assert {path: method['type'] for path, method in delta.header.methods.items()} == {
        '': 'PeftModel',
        'backbone': 'Mona',
    }
    again = build()
    again.load_state_dict({n: t for n, t in model.state_dict().items() if n not in trains}, strict=False)
    load_delta(again, tmp_path / 'a.delta.safetensors')
    assert_equal(raw_outputs(again), raw_outputs(model))
    for changed, why in (
        (dict(rank=2, alpha=2), 'a delta of another method'),
        (dict(path='decoder.layers.0.**.attn.**'), 'does not fit'),
        (dict(path='decoder.**.attn.*'), 'on another frozen base'),  # the same layers, in a base of other values
    ):
        other = PeftModel(base=copy.deepcopy(cfg), targets=[{**targets[0], **changed}])
        with pytest.raises(CheckpointMismatchError, match=why):
            load_delta(other, tmp_path / 'a.delta.safetensors')
    with pytest.raises(ConfigError, match='Mona cannot be merged'):
        mona_mm.merge(model)


def retinanet(**changes) -> Config:
    narrow = dict(neck__in_channels=[8, 16, 32, 64], neck__out_channels=16, bbox_head__in_channels=16)
    narrow |= dict(bbox_head__feat_channels=16, bbox_head__num_classes=4)
    return model_config('retinanet/retinanet_r50_fpn_1x_coco.py', **narrow | changes)


def test_a_resnet_and_a_neck():
    """LoRA beside the convolutions of a ResNet, of an FPN and of a head; stages that the ResNet itself freezes are
    refused by name, and the others are not."""
    targets = [dict(LORA, path=['backbone.layer{3,4}.**', 'neck.**.conv', 'bbox_head.cls_convs.*.conv'])]
    model = PeftModel(base=retinanet(), targets=targets)
    model.init_weights()
    assert len(model.peft_record.targets[0].layers) == 10 + 8 + 4
    model.train()
    losses(model).backward()
    assert all((p.grad is not None) == ('.peft.' in n) for n, p in model.named_parameters())
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    count = count_trainable(model)
    assert 0 < count.backbone_trainable < count.trainable and count.method == 'LoRA'

    off_zero(model).double()
    expected = raw_outputs(model)
    mona_mm.merge(model)
    assert_near(raw_outputs(model), expected, 1e-9)
    with pytest.raises(ConfigError, match=r'frozen_stages=1 in the base config: ResNet freezes .* the LoRA modules'):
        PeftModel(base=retinanet(), targets=[dict(LORA, path='backbone.**')])


@pytest.mark.parametrize('depth', [18, 50])
def test_a_resnet_as_base(depth):
    """A ResNet alone, with activation checkpoints, which recompute: gradients are those without them."""
    base = dict(type='mmdet.ResNet', depth=depth, base_channels=8, style='pytorch', norm_cfg=dict(type='BN'))
    results = []
    x = torch.randn(2, 3, 64, 64)
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = PeftModel(base=dict(base, with_cp=with_cp), targets=[dict(LORA, path='layer*.**.conv*')])
        off_zero(model).train()
        sum(out.square().mean() for out in model(x)).backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert_near(results[1], results[0])
    with pytest.raises(ConfigError, match='frozen_stages=2'):
        PeftModel(base=dict(base, frozen_stages=2), targets=[dict(LORA, path='layer*.**.conv*')])
    last = PeftModel(base=dict(base, frozen_stages=2), targets=[dict(LORA, path='layer4.**')])
    last.train()
    assert all(p.requires_grad == ('.peft.' in n) for n, p in last.named_parameters())


def test_in_a_frozen_model():
    """A FrozenModel around a neck that is a PeftModel: its LoRA trains, and the rest of it does not."""
    cfg = retinanet()
    cfg.neck = dict(type='mona_mm.PeftModel', base=cfg.neck, targets=[dict(LORA, path='lateral_convs.*.conv')])
    model = FrozenModel(base=cfg, trainable='bbox_head')
    model.init_weights()
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains == {n for n, _ in model.named_parameters() if '.peft.' in n or n.startswith('bbox_head.')}
    check_trainable(model)
    described = mona_mm.checkpoint.described_methods.describe_methods(model)
    assert [described[path]['type'] for path in ('', 'neck')] == [None, 'PeftModel']
    counted = {part.part: part.trainable for part in count_trainable(model).parts}
    assert counted['method (LoRA: lateral_convs.*.conv)'] == 2 * (16 + 32 + 64 + 3 * 16) and counted['neck'] == 0


def write_config(folder: Path) -> str:
    """A config of a PeftModel that starts from a whole stock model."""
    stock = dict(type='SmallModel', backbone=HOSTS['mmdet-swin'])
    torch.save(MODELS.build(stock).state_dict(), folder / 'whole.pth')
    targets = [dict(LORA, path='backbone.**.qkv'), dict(LORA, path='head.0')]
    model = dict(type='mona_mm.PeftModel', base=stock, targets=targets, trainable='head.2')
    data = dict(dataset=dict(type='Images'), batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler'))
    cfg = dict(
        default_scope='mmengine',
        load_from=str(folder / 'whole.pth'),
        model=model,
        train_dataloader=data,
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(constructor='mona_mm.PeftOptimWrapperConstructor', optimizer=dict(type='SGD', lr=0.5)),
        default_hooks=dict(checkpoint=dict(type='mona_mm.SafeCheckpointHook')),
        custom_hooks=[dict(type=f'mona_mm.{hook}Hook') for hook in ('ParamFreeze', 'LoadCheck', 'DeltaCheckpoint')],
    )
    Config(cfg).dump(str(folder / 'config.py'))
    return str(folder / 'config.py')


@pytest.mark.slow
def test_the_command_lines(tmp_path, tool):
    """A run prints what matched and writes a delta; the tools count, describe and merge it, and the merged file is a
    stock model's with a stock config."""
    config, work = write_config(tmp_path), tmp_path / 'work'
    status, out, err = tool('train.py', config, '--work-dir', str(work))
    log = next(work.rglob('*.log')).read_text()
    assert status == 0, err
    assert 'method (LoRA: backbone.**.qkv)' in log and 'LoRA beside 1 layers: head.* (1)' in log
    assert 'frozen parameters are unchanged, bit for bit' in log
    delta, merged = str(work / 'epoch_1.delta.safetensors'), str(tmp_path / 'merged.pth')
    status, out, err = tool('count_params.py', config, '--json')
    assert status == 0 and json.loads(out)[0]['method'] == 'LoRA', err
    status, out, err = tool('delta.py', 'info', delta)
    assert status == 0 and "model: PeftModel(targets=[{'path': 'backbone.**.qkv'" in out.replace('"', "'"), (out, err)
    status, out, err = tool('delta.py', 'merge', config, delta, merged)
    assert status == 0 and 'stock config loads it' in out, err
    checkpoint = torch.load(merged, weights_only=True)
    text = checkpoint['meta']['cfg']
    assert 'mona_mm' not in text and not any('.peft.' in name for name in checkpoint['state_dict'])
    stock = MODELS.build(Config.fromstring(text, '.py').model).eval()
    stock.load_state_dict(checkpoint['state_dict'])
    model = MODELS.build(load_config(config).model).eval()
    load_delta(model, delta)  # and its base, which it names
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert_near(stock.double()(x), model.double()(x), 1e-6)
        assert_near(mona_mm.merge(model)(x), stock(x), 1e-6)


@pytest.mark.slow
def test_a_model_with_mona_is_merged_with_a_config_of_its_own(tmp_path, tool):
    """Its Mona is folded, and LoRA stays beside its layers."""
    cfg = retinanet(neck__in_channels=[24, 48, 96, 192])
    cfg.backbone = dict(type='mona_mm.PeftBackbone', base=HOSTS['mmdet-swin'], peft=dict(type='Mona', bottleneck=4))
    peft = dict(type='mona_mm.PeftModel', base=cfg, targets=[dict(LORA, path='neck.{lateral,fpn}_convs.*.conv')])
    Config(dict(default_scope='mmdet', model=peft, load_from=str(tmp_path / 'whole.pth'))).dump(tmp_path / 'config.py')
    config = str(tmp_path / 'config.py')
    model = MODELS.build(load_config(config).model)
    model.init_weights()
    torch.save({n: t for n, t in model.state_dict().items() if '.peft.' not in n}, tmp_path / 'whole.pth')
    off_zero(model)
    delta, merged = str(tmp_path / 'a.delta.safetensors'), str(tmp_path / 'merged.pth')
    save_delta(model, delta, base_file=str(tmp_path / 'whole.pth'))
    status, out, err = tool('delta.py', 'merge', config, delta, merged)
    assert status == 0 and 'a config of its own in it (Mona computes what no stock model does)' in out, (out, err)
    checkpoint = torch.load(merged, weights_only=True)
    assert 'deploy=True' in checkpoint['meta']['cfg'] and 'PeftModel' in checkpoint['meta']['cfg']
    again = MODELS.build(Config.fromstring(checkpoint['meta']['cfg'], '.py').model).eval()
    again.load_state_dict(checkpoint['state_dict'])
    assert_near(raw_outputs(again), raw_outputs(model))


EXAMPLE = str(ROOT / 'configs/lora/lora_dino_r50_coco.py')


def test_the_shipped_example():
    """Its base is mmdet's DINO, as mmdet builds it; at full size LoRA is beside all attention of both transformers."""
    cfg = load_config(EXAMPLE)
    assert cfg.model.base == Config.fromfile(str(CONFIGS / 'dino/dino-4scale_r50_8xb2-12e_coco.py')).model
    model = build_on_meta(cfg)
    deformable_inputs_and_outputs = 4 * 256 + 256 + 128 + 256 + 256  # offsets, weights, values, output
    attention = 256 + 3 * 256 + 256 + 256
    lora = 16 * (12 * deformable_inputs_and_outputs + 6 * attention)
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert sum(size for n, size in trained.items() if '.peft.' in n) == lora
    assert {n.partition('.')[0] for n in trained} == {'encoder', 'decoder', 'bbox_head', 'dn_query_generator'}
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    assert sum(len(group['params']) for group in wrapper.optimizer.param_groups) == len(trained)


@pytest.mark.slow
def test_the_shipped_example_on_other_classes(demo_data, tmp_path, tool):
    """As docs/layers.md says: from a detector of other classes to the user's, with a delta and predictions."""
    narrow = {
        **{f'model.base.{key}.num_layers': 1 for key in ('encoder', 'decoder')},
        'model.base.backbone.depth': 18,
        'model.base.backbone.base_channels': 8,
        'model.base.backbone.init_cfg': None,
        'model.base.neck.in_channels': [16, 32, 64],
        'model.base.num_queries': 20,
        'model.base.test_cfg.max_per_img': 5,
    }
    cfg = load_config(EXAMPLE, dict(narrow))
    init_default_scope('mmdet')
    other = MODELS.build(cfg.model.base)
    other.init_weights()
    torch.save(dict(state_dict=other.state_dict()), tmp_path / 'coco.pth')
    resize = dict(type='Resize', scale=(96, 96), keep_ratio=True)
    pipelines = {split: copy.deepcopy(cfg[f'{split}_dataloader'].dataset.pipeline) for split in ('train', 'val')}
    pipelines['train'][3] = pipelines['val'][1] = resize
    small = tmp_path / 'small.py'
    small.write_text(
        f"_base_ = ['{EXAMPLE}']\n"
        + ''.join(f'{split}_dataloader = dict(dataset=dict(pipeline={p}))\n' for split, p in pipelines.items())
    )
    options = {
        **narrow,
        'data_root': demo_data,
        'classes': '[disc,square,triangle,star]',
        'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False,
        'val_dataloader.num_workers': 0,
        'val_dataloader.persistent_workers': False,
        'train_dataloader.dataset.indices': 2,
        'val_dataloader.dataset.indices': 1,
        'train_cfg.max_epochs': 1,
    }
    arguments = [str(small), '--work-dir', str(tmp_path / 'work'), '--fine-tune', str(tmp_path / 'coco.pth')]
    given = [f'{key}={value}' for key, value in options.items()]
    status, out, err = tool('train.py', *arguments, '--cfg-options', *given)
    assert status == 0, err
    log = next((tmp_path / 'work').rglob('*.log')).read_text()
    assert 'LoRA beside 10 layers' in log and 'coco/bbox_mAP' in log
    delta = read_delta(str(tmp_path / 'work/epoch_1.delta.safetensors'))
    assert delta.tensors['dn_query_generator.label_embedding.weight'].shape == (4, 256)
    changed = [n for n, t in delta.tensors.items() if n.endswith('up.weight') and (t != 0).any()]
    assert len(changed) == 10 and delta.header.base_file == str(tmp_path / 'coco.pth')
