"""What the tests share: small hosts of every kind, small data, a small detector, and the independent evidence."""

import copy
import gc
import json
import os
import runpy
import sys
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from safetensors import safe_open
from torch.utils.data import DataLoader

import mona_mm  # noqa: F401  first: it makes the OpenMMLab libraries importable
from mona_mm.config.load import load_config
from mona_mm.nn import choice

pytest.register_assert_rewrite('helpers', 'suite', 'small_models', 'toy_runs', 'fast_forms', 'shipped')

# The models here are too small for a second thread to pay, and two of them fight on a busy machine. Who asks for more
# wants to know whether they change a result.
torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))

# Imports and models make many objects and hardly any garbage: it is looked for a thirtieth as often.
gc.set_threshold(20_000, 20, 20)

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / 'tests/golden'

_read_config = getattr(Config, '_file2dict', None)  # private: another mmengine may have none


@cache
def _what_it_says(file: str, args: tuple, kwargs: tuple) -> tuple:
    return _read_config(file, *args, **dict(kwargs))


def _read_config_once(filename, *args, **kwargs):
    """mmengine copies a config and each file that it is based on to another folder, parses it four times and executes
    it, a fifth of a second in all: the shipped configs, which no test changes, are read once."""
    file = os.path.abspath(filename)
    if not file.startswith(f'{ROOT}/configs/') or not os.path.isfile(file):
        return _read_config(filename, *args, **kwargs)
    return copy.deepcopy(_what_it_says(file, args, tuple(sorted(kwargs.items()))))


if _read_config is not None:
    Config._file2dict = staticmethod(_read_config_once)

needs_gpu = pytest.mark.needs_gpu

# One stage has a second block, whose windows are shifted: a block costs the same time in each stage.
SWIN = dict(embed_dims=24, depths=(2, 1, 1, 1), num_heads=(1, 2, 3, 4))
# For runs, checkpoints and deltas, which are of all modules alike: a block in each of two stages.
SMALL_SWIN = dict(
    type='mmdet.SwinTransformer',
    drop_path_rate=0.3,
    embed_dims=24,
    depths=(1, 1),
    num_heads=(1, 2),
    strides=(4, 2),
    out_indices=(0, 1),
)
VIT = dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64)
HOSTS = {
    'mmdet-swin': dict(type='mmdet.SwinTransformer', drop_path_rate=0.3, **SWIN),
    'mmseg-swin': dict(type='mmseg.SwinTransformer', drop_path_rate=0.3, **SWIN),
    'mmpretrain-swin': dict(
        type='mmpretrain.SwinTransformer',
        arch={**SWIN},
        drop_path_rate=0.3,
        out_indices=(0, 1, 2, 3),
        pad_small_map=True,
    ),
    'mmpretrain-vit': dict(
        type='mmpretrain.VisionTransformer', arch=VIT, img_size=64, drop_path_rate=0.3, out_type='raw'
    ),
    'mmpretrain-vit-no-cls': dict(
        type='mmpretrain.VisionTransformer',
        arch=VIT,
        img_size=64,
        drop_path_rate=0.3,
        out_type='featmap',
        with_cls_token=False,
    ),
    'mmpretrain-swinv2': dict(
        type='mmpretrain.SwinTransformerV2',
        arch=dict(**SWIN, extra_norm_every_n_blocks=2),
        img_size=64,
        window_size=4,
        drop_path_rate=0.3,
        out_indices=(0, 1, 2, 3),
        pad_small_map=True,
    ),
    'mmpretrain-convnext': dict(
        type='mmpretrain.ConvNeXt',
        arch=dict(depths=[2, 1, 1, 1], channels=[24, 48, 96, 192]),
        drop_path_rate=0.3,
        layer_scale_init_value=0.5,
        out_indices=(0, 1, 2, 3),
        gap_before_final_norm=False,
    ),
    'mmpretrain-convnextv2': dict(
        type='mmpretrain.ConvNeXt',
        arch=dict(depths=[1, 1, 2, 1], channels=[16, 24, 32, 40]),
        drop_path_rate=0.3,
        layer_scale_init_value=0.0,
        use_grn=True,
        linear_pw_conv=False,
        out_indices=(0, 1, 2, 3),
        gap_before_final_norm=False,
    ),
    'mmdet-pvtv2': dict(
        type='mmdet.PyramidVisionTransformerV2',
        embed_dims=16,
        num_layers=[1, 1, 2, 1],
        num_heads=[1, 2, 3, 4],
        mlp_ratios=[2, 2, 2, 2],
        drop_path_rate=0.3,
    ),
}


class _beside_the_checkout:
    """Whether the test that runs may look there."""

    allowed = False


class _imported:
    """How many modules there were when they were last left out of garbage collection."""

    modules = 0


def leave_modules_out_of_garbage_collection() -> None:
    """Garbage is not looked for among the objects of what has been imported, when much has been since the last time:
    mmengine collects whenever it reads a data set, and each time would go through all libraries, which come as the
    tests need them. That is a tenth of the whole run."""
    if len(sys.modules) > _imported.modules + 100:
        _imported.modules = len(sys.modules)
        gc.collect()
        gc.freeze()


def pytest_collection_finish(session):
    leave_modules_out_of_garbage_collection()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    leave_modules_out_of_garbage_collection()


def pytest_runtest_setup(item):
    if item.get_closest_marker('needs_gpu') and not torch.cuda.is_available():
        pytest.skip('needs a GPU')
    _beside_the_checkout.allowed = item.get_closest_marker('real_images') is not None


def real_images(name: str) -> Path:
    """A folder of real images beside the checkout, which are too large to be in it. A test that needs them is marked
    ``real_images``, and skips where they are not there."""
    assert _beside_the_checkout.allowed, 'mark this test: @pytest.mark.real_images'
    path = ROOT.parent / 'shared/data' / name
    if not path.exists():
        pytest.skip(f'the real images of {path} are not on this machine')
    return path


def golden(name: str, dtype: torch.dtype = torch.float32) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors, in ``dtype``, and the metadata of one file of outputs of the published code; see
    tests/golden/README.md. A Swin with a method has the weights, input and cotangents of the one base."""
    tensors = {}
    for each in ('swin_base', name) if name.startswith('swin_') else (name,):
        with safe_open(GOLDEN / f'{each}.safetensors', 'pt') as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
    return {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}, metadata


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors under a prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def golden_swin_config(metadata: dict[str, str]) -> dict:
    """The published code's Swin arguments, as mmdet's and mmseg's Swin take them."""
    published = json.loads(metadata['config'])
    same = ('depths', 'num_heads', 'window_size', 'drop_path_rate', 'patch_norm')
    return dict(embed_dims=published['embed_dim'], **{key: published[key] for key in same})


@pytest.fixture(autouse=True)
def fixed_choices(monkeypatch):
    """Every choice between ways to compute the same is the first one, whatever is fastest on the machine of the tests.
    ``choice.measure(True)`` measures in a test."""
    monkeypatch.setattr(choice, '_measures', False)
    monkeypatch.setattr(choice, '_chosen', {})


@pytest.fixture(autouse=True)
def quick_runners(monkeypatch):
    """What takes three quarters of a small run and is tested by those in processes of their own: a Runner asks the
    compilers for their versions and formats the config's text, which every dump of a config does as well; and a model
    logs in two lines how each of its parameters was initialised."""
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)
    monkeypatch.setattr('mmengine.model.base_module.BaseModule._dump_init_info', lambda self, *args: None)
    for module in ('mmengine.config.config', 'yapf.yapflib.yapf_api'):  # the fork imports it when it needs it
        monkeypatch.setattr(f'{module}.FormatCode', lambda text, **_: (text, True), raising=False)


class _Undrawn:
    """In the place of matplotlib's canvases: an empty picture of the same kind."""

    def __init__(self, chart) -> None:
        assert isinstance(chart, Figure)

    def print_svg(self, file, metadata) -> None:
        file.write('<svg></svg>')

    def print_figure(self, file, dpi) -> None:
        file.write(cv2.imencode('.png', np.zeros((8, 8, 3), np.uint8))[1].tobytes())


@pytest.fixture
def drawn_charts():
    """Charts are drawn in this test."""


@pytest.fixture(autouse=True)
def undrawn_charts(request, monkeypatch):
    """The charts of pages and reports are made and not drawn, also in processes that are forked from a test: drawing
    takes two thirds of a small run. What is about charts has the fixture ``drawn_charts``."""
    if 'drawn_charts' not in request.fixturenames:
        for canvas in ('FigureCanvasSVG', 'FigureCanvasAgg'):
            monkeypatch.setattr(f'mona_mm.report.html.{canvas}', _Undrawn)


@pytest.fixture(params=HOSTS)
def host(request) -> dict:
    """The config of a small backbone of each supported kind."""
    return dict(HOSTS[request.param])


@pytest.fixture(scope='session')
def demo_data(tmp_path_factory) -> Path:
    """Six training and two validation images in COCO's layout."""
    from mona_mm.datasets.shapes import make_demo_dataset

    root = tmp_path_factory.mktemp('data') / 'shapes'
    make_demo_dataset(root, train=6, val=2)
    return root


@pytest.fixture
def detector_config(demo_data, tmp_path) -> Config:
    """The demo's detector, one block a stage: six iterations an epoch, batch 1, everything deterministic."""
    cfg = load_config(str(ROOT / 'configs/demo/demo_mona_shapes.py'), dict(data_root=str(demo_data)))
    cfg.merge_from_dict(
        {
            'work_dir': str(tmp_path / 'work'),
            'model.backbone.base.depths': [1, 1, 1, 1],
            'train_dataloader.batch_size': 1,
            'train_dataloader.num_workers': 0,
            'train_dataloader.persistent_workers': False,
            'val_dataloader.num_workers': 0,
            'val_dataloader.persistent_workers': False,
            'randomness': dict(seed=0),
            'default_hooks.logger.interval': 1,
        }
    )
    cfg.test_dataloader = cfg.val_dataloader
    return cfg


@pytest.fixture(scope='session')
def base_file(tmp_path_factory) -> Path:
    """The pretrained base: a Swin's random weights."""
    file = tmp_path_factory.mktemp('base') / 'base.pth'
    torch.manual_seed(11)
    model = MODELS.build(SMALL_SWIN)
    model.init_weights()
    torch.save(model.state_dict(), file)
    return file


@pytest.fixture
def make_runner(tmp_path, request):
    from toy_runs import Images, Toy

    def make(backbone, hooks=(), epochs=1, checkpoint=None, wrap=None, **kwargs):
        model = Toy(backbone)
        arguments = dict(
            model=wrap(model) if wrap else model,
            work_dir=str(tmp_path / 'work'),
            train_dataloader=DataLoader(Images(), batch_size=2, sampler=DefaultSampler(Images(), shuffle=True)),
            train_cfg=dict(by_epoch=True, max_epochs=epochs),
            optim_wrapper=dict(
                constructor='mona_mm.PeftOptimWrapperConstructor',
                optimizer=dict(type='AdamW', lr=0.1, weight_decay=0.5),
            ),
            default_hooks=dict(checkpoint=checkpoint or dict(type='mona_mm.SafeCheckpointHook', interval=1)),
            custom_hooks=list(hooks),
            randomness=dict(seed=0),
            experiment_name=f'{request.node.name}-{id(model)}',
            log_level='INFO',
        )
        return Runner(**{**arguments, **kwargs})

    return make


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run a command line in this process: (exit status, standard output, standard error)."""

    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, 'argv', [name, *arguments])
        status = 0
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / 'tools' / name), run_name='__main__')
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture(autouse=True)
def _fresh_state():
    """Every test begins from the same random numbers, and without the scope, loggers, message hubs and visualizers of a
    test before it."""
    torch.manual_seed(0)
    yield
    managers = [DefaultScope, MMLogger, MessageHub, Visualizer]
    for manager in managers:
        managers += manager.__subclasses__()
        manager._instance_dict.clear()
