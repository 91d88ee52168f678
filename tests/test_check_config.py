"""Misspelt keys, unknown types and wrong values are found before anything is built, all at once, and nothing else."""

import pytest
from conftest import ROOT
from mmengine.config import Config
from mmengine.utils import get_installed_path

from mona_mm.config.check import check_config
from mona_mm.config.load import load_config
from mona_mm.errors import ConfigError

DEMO = ROOT / 'configs/demo/demo_mona_shapes.py'


@pytest.fixture(scope='module')
def demo() -> Config:
    return load_config(str(DEMO))


MISTAKES = {
    'optim_wraper.optimizer.lr=3': "Nothing reads 'optim_wraper'. Did you mean 'optim_wrapper'?",
    'trian_cfg.max_epochs=3': "Nothing reads 'trian_cfg'. Did you mean 'train_cfg'?",
    'optim_wrapper.optimiser.lr=3': "optim_wrapper has no 'optimiser'. Did you mean 'optimizer'?",
    'optim_wrapper.optimizer.lrr=3': "optim_wrapper.optimizer has no 'lrr'. Did you mean 'lr'?",
    'optim_wrapper.optimizer.type=AdamWW': "there is no optimizer 'AdamWW'. Did you mean 'AdamW'?",
    'optim_wrapper.clip_gradd.max_norm=1': "optim_wrapper has no 'clip_gradd'. Did you mean 'clip_grad'?",
    'optim_wrapper.clip_grad.maxnorm=1': "optim_wrapper.clip_grad has no 'maxnorm'. Did you mean 'max_norm'?",
    'optim_wrapper.paramwise_cfg.norm_decay_mul=0': "has no 'norm_decay_mul'. Did you mean 'norm_decay_mult'?",
    'optim_wrapper.paramwise_cfg.custom_keys.norm.decay_mul=0': "norm has no 'decay_mul'. Did you mean 'decay_mult'?",
    'train_cfg.max_epoch=3': "train_cfg has no 'max_epoch'. Did you mean 'max_epochs'?",
    'train_cfg.max_epochs=0': 'train_cfg: max_epochs=0 must be a whole number of at least 1',
    "train_cfg.max_epochs='12 '": "train_cfg: max_epochs='12 ' must be a whole number",
    'train_dataloader.batchsize=4': "train_dataloader has no 'batchsize'. Did you mean 'batch_size'?",
    'train_dataloader.batch_size=0': 'train_dataloader: batch_size=0 must be a whole number of at least 1',
    'train_dataloader.dataset.data_prefx.img=x': "dataset has no 'data_prefx'. Did you mean 'data_prefix'?",
    'train_dataloader.dataset.pipeline.0.colour_type=x': "pipeline.0 has no 'colour_type'. Did you mean 'color_type'?",
    'val_dataloader.sampler.shufle=True': "val_dataloader.sampler has no 'shufle'. Did you mean 'shuffle'?",
    'default_hooks.checkpoint.intervall=2': "default_hooks.checkpoint has no 'intervall'. Did you mean 'interval'?",
    'default_hooks.logger.interval=often': "default_hooks.logger: interval='often' must be a whole number",
    'custom_hooks.0.trainabel=norm': "custom_hooks.0 has no 'trainabel'. Did you mean 'trainable'?",
    'param_scheduler.0.strat_factor=2': "param_scheduler.0 has no 'strat_factor'. Did you mean 'start_factor'?",
    'val_evaluator.metrics=bbox': "val_evaluator.0 has no 'metrics'. Did you mean 'metric'?",
    'model.backbone.trainabel=norm': "model.backbone has no 'trainabel'. Did you mean 'trainable'?",
    'model.backbone.peft.bottelneck=8': "model.backbone.peft: Mona has no argument 'bottelneck'",
    'model.backbone.peft.bottleneck=0': 'model.backbone.peft: Mona: bottleneck=0 must be',
    'randomness.seed=first': "randomness: seed='first' must be a whole number or None",
}


def with_option(cfg: Config, option: str) -> Config:
    """A copy of a config with one setting of --cfg-options."""
    key, _, text = option.partition('=')
    value = {'True': True}.get(text, int(text) if text.lstrip('-').isdigit() else text.strip("'"))
    cfg = cfg.copy()
    if key.startswith('param_scheduler.') and not isinstance(cfg.param_scheduler, list):
        cfg.param_scheduler = [cfg.param_scheduler]
    cfg.merge_from_dict({key: value})
    return cfg


@pytest.mark.parametrize('option', MISTAKES)
def test_a_mistake_is_named_with_the_nearest_name(option, demo):
    with pytest.raises(ConfigError) as error:
        check_config(with_option(demo, option), [option.partition('=')[0]])
    assert MISTAKES[option] in str(error.value)
    assert 'mistakes in this config' not in str(error.value), 'it is the only one'


def test_all_mistakes_are_in_one_error(demo):
    """Of several causes, numbered."""
    alone = ('train_cfg.max_epochs=', 'optim_wrapper.optimi', 'model.backbone.peft.bottleneck')
    chosen = [option for option in MISTAKES if not option.startswith(alone)]
    cfg = demo
    for option in chosen:
        cfg = with_option(cfg, option)
    with pytest.raises(ConfigError) as error:
        check_config(cfg, [option.partition('=')[0] for option in chosen])
    text = str(error.value)
    assert text.startswith(f'{len(chosen)} mistakes in this config: (1) ') and f'({len(chosen)}) ' in text
    assert all(MISTAKES[option] in text for option in chosen) and '\n' not in text


def test_the_tools_say_it(tool, demo_data, tmp_path):
    """Before anything is built, on the command line."""
    status, _, err = tool(
        'train.py', 'configs/demo/demo_mona_shapes.py', '--work-dir', str(tmp_path), '--cfg-options',
        f'data_root={demo_data}', 'optim_wraper.optimizer.lr=3', 'train_dataloader.batchsize=2',
    )  # fmt: skip
    assert status == 2 and err.startswith('error: 2 mistakes in this config: (1) ') and err.count('\n') == 1
    assert not list(tmp_path.iterdir())


def test_names_of_ones_own_are_left_alone(demo):
    """At the top, in arguments that a class hands on, and in what constructors of other code read."""
    cfg = demo.copy()
    cfg.merge_from_dict({'my_option': 1, 'img_scale': (1, 2), 'optim_wrapper.paramwise_cfg.num_layers': 12})
    cfg.optim_wrapper.constructor = 'LearningRateDecayOptimizerConstructor'
    check_config(cfg, ['my_option'])


OWN = [
    *('mona/cascade_swin_b_coco', 'mona/upernet_swin_l_ade20k', 'rein/rein_mask2former_dinov2_s_cityscapes'),
    *('lora/lora_dino_r50_coco', 'spt_lora/spt_lora_vtab_vit_b_in21k', 'full/full_upernet_dinov2_b_ade20k'),
]
STOCK = dict(
    mmdet=['faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', 'dino/dino-4scale_r50_8xb2-12e_coco.py'],
    mmseg=[
        'mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512.py',
        'pspnet/pspnet_r101-d8_4xb2-40k_cityscapes-512x1024.py',
    ],
    mmpretrain=['mae/mae_vit-base-p16_8xb512-amp-coslr-300e_in1k.py', 'swin_transformer/swin-tiny_16xb64_in1k.py'],
)


def own_configs() -> list:
    """Every shipped config; those that others show as well are slow."""
    names = sorted(file for file in (ROOT / 'configs').glob('*/*.py') if file.parent.name != '_base_')
    chosen = {ROOT / 'configs' / f'{name}.py' for name in OWN}
    return [
        pytest.param(file, id=f'{file.parent.name}/{file.stem}', marks=[] if file in chosen else [pytest.mark.slow])
        for file in names
    ]


@pytest.mark.parametrize('file', own_configs())
def test_shipped_configs_are_right(file):
    check_config(load_config(str(file)))


@pytest.mark.parametrize('library', STOCK)
def test_stock_configs_are_right(library):
    """What the libraries ship passes."""
    folder = get_installed_path(library)
    for name in STOCK[library]:
        check_config(load_config(f'{folder}/.mim/configs/{name}'))


def test_a_config_in_pure_python(tmp_path):
    """Its types are objects that import their classes late; misspellings are found in it as well."""
    text = (
        'from mmengine.hooks import CheckpointHook\nfrom torch.optim import AdamW\n'
        'optim_wrapper = dict(optimizer=dict(type=AdamW, {}=1.0))\n'
        'default_hooks = dict(checkpoint=dict(type=CheckpointHook, {}=2))\ndefault_scope = None\n'
    )
    (tmp_path / 'right.py').write_text(text.format('lr', 'interval'))
    check_config(load_config(str(tmp_path / 'right.py')))
    (tmp_path / 'wrong.py').write_text(text.format('lrr', 'intervall'))
    with pytest.raises(ConfigError, match="2 mistakes.*optimizer has no 'lrr'.*checkpoint has no 'intervall'"):
        check_config(load_config(str(tmp_path / 'wrong.py')))


@pytest.mark.slow
@pytest.mark.parametrize('library', STOCK)
def test_every_eighth_stock_config_is_right(library):
    from pathlib import Path

    folder = Path(get_installed_path(library), '.mim/configs')
    files = [file for file in sorted(folder.rglob('*.py')) if not {'_base_', 'benchmarks'} & set(file.parts)]
    wrong = {}
    for file in files[::8]:
        try:
            cfg = load_config(str(file))
        except Exception:  # some need what is not installed
            continue
        try:
            check_config(cfg)
        except ConfigError as error:
            wrong[str(file.relative_to(folder))] = str(error)
    assert not wrong
