"""What tools/delta.py merge writes is a stock model: the libraries' own configs and calls load it, without mona_mm.

The other side is a process in which mona_mm cannot be imported. mmdet and mmseg do not import there on mmcv-lite, whose
missing operators mona_mm stands in for; with a compiled mmcv (``MMCV_WITH_OPS=1 pip install mmcv``) they do.
"""

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from conftest import HOSTS  # noqa: F401  first: it imports mona_mm
from helpers import assert_near
from mmcv import _ext, imwrite
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import get_installed_path
from suite import plan_for

from mona_mm import save_delta
from mona_mm.checkpoint.delta import changing
from mona_mm.config.load import adapt_to_device

needs_compiled_mmcv = pytest.mark.skipif(
    Path(_ext.__file__).name == 'mmcv_ops.py', reason='needs a compiled mmcv, to import this library without mona_mm'
)

SIDE = 224
LIBRARIES = dict(
    mmdet=(
        'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
        """
        from mmdet.apis import inference_detector, init_detector
        model = init_detector(config, checkpoint, device='cpu')
        assert inference_detector(model, 'image.png').pred_instances.scores.isfinite().all()
        """,
        lambda model, x: [map for maps in model.rpn_head(model.extract_feat(x)) for map in maps],
    ),
    mmseg=(
        'swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
        """
        from mmengine.model import revert_sync_batchnorm
        from mmseg.apis import inference_model, init_model
        model = revert_sync_batchnorm(init_model(config, checkpoint, device='cpu'))
        assert inference_model(model, 'image.png').seg_logits.data.isfinite().all()
        """,
        lambda model, x: [model.decode_head(model.extract_feat(x))],
    ),
    mmpretrain=(
        'swin_transformer/swin-tiny_16xb64_in1k.py',
        """
        from mmpretrain import ImageClassificationInferencer
        inferencer = ImageClassificationInferencer(config, pretrained=checkpoint, device='cpu')
        assert 0 < inferencer('image.png')[0]['pred_score'] <= 1
        model = inferencer.model
        """,
        lambda model, x: [model(x)],
    ),
)
"""By library: a config that it ships, what loads it, and what is compared."""

METHODS = dict(
    lora=dict(peft=dict(type='LoRA', rank=4)),
    spt=dict(peft=dict(type='SPT')),
    bitfit=dict(trainable='bitfit'),
    partial_1=dict(trainable='partial_1'),
    norm_tuning=dict(trainable='norm_tuning'),
)


def run_stock(folder: Path, config: str, load: str) -> torch.nn.Module:
    """The model that a library's own call makes, in a process that cannot import mona_mm."""
    lines = [
        'import sys, torch',
        'sys.modules["mona_mm"] = None',
        'torch.set_num_threads(1)',
        f'config, checkpoint = {config!r}, "merged.pth"',
        dedent(load),
        'assert not any(name.partition(".")[0] == "mona_mm" for name, module in sys.modules.items() if module)',
        'torch.save(model.state_dict(), "loaded.pth")',
    ]
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', '\n'.join(lines)], cwd=folder, env={}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout[-1500:], done.stderr[-1500:])
    return torch.load(folder / 'loaded.pth')


@pytest.mark.slow
@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize(
    'library', [pytest.param(name, marks=[needs_compiled_mmcv] * (name != 'mmpretrain')) for name in LIBRARIES]
)
def test_merged_loads_into_the_stock_library(library, method, tmp_path, tool):
    """A delta on a config that the library ships, merged: the library's own call loads it with that very config, where
    mona_mm cannot be imported, every tensor of it; inference runs, and the outputs are those of the tuned model."""
    file, load, outputs = LIBRARIES[library]
    file = str(Path(get_installed_path(library), '.mim/configs', file))
    cfg = Config.fromfile(file)
    init_default_scope(library)
    adapt_to_device(cfg)
    base = MODELS.build({**cfg.model.backbone, 'init_cfg': None})
    torch.save(base.state_dict(), tmp_path / 'base.pth')
    stock = {**cfg.model.backbone, 'init_cfg': dict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth'))}
    options = dict(METHODS[method])
    if method == 'spt':
        plan_for({**stock, 'init_cfg': None}, dict(type='LoRA', rank=4)).save(tmp_path / 'plan.safetensors')
        options['peft'] = dict(type='SPT', plan=str(tmp_path / 'plan.safetensors'))
    cfg.model.backbone = dict(type='mona_mm.PeftBackbone', base=stock, **options)
    cfg.dump(tmp_path / 'config.py')
    model = MODELS.build(cfg.model)
    model.init_weights()
    with torch.no_grad():
        for name in changing(model):
            if model.state_dict()[name].is_floating_point():
                model.state_dict()[name].add_(torch.rand_like(model.state_dict()[name]) * 0.02)
    delta, merged = str(tmp_path / 'a.delta.safetensors'), str(tmp_path / 'merged.pth')
    save_delta(model, delta)
    status, out, err = tool('delta.py', 'merge', str(tmp_path / 'config.py'), delta, merged)
    assert status == 0 and 'A stock checkpoint' in out, err

    imwrite(torch.randint(256, (SIDE, SIDE, 3), dtype=torch.uint8).numpy(), str(tmp_path / 'image.png'))
    state = run_stock(tmp_path, file, load)
    stock_cfg = Config.fromfile(file)
    adapt_to_device(stock_cfg)
    again = MODELS.build(stock_cfg.model)
    again.load_state_dict(state)
    wanted = torch.load(merged)['state_dict']
    assert state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in state)
    x = torch.randn(1, 3, SIDE, SIDE)
    model.eval()
    again.eval()
    with torch.no_grad():
        for a, b in zip(outputs(again.double(), x.double()), outputs(model.double(), x.double()), strict=True):
            assert_near(a, b)
