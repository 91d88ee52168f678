"""SPT from end to end on the real images of every dense task, scaled down in size only."""

import copy
import os

import pytest
import torch
from conftest import real_images
from helpers import assert_near
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from shipped import CONFIGS, NARROW, NARROW_TASK, REAL, kind

import mona_mm
from mona_mm.commands.cli import build_runner
from mona_mm.config.load import adapt_to_device, load_config
from mona_mm.data_check.check import check_data
from mona_mm.spt import Plan
from mona_mm.spt_plans.plans import make_plan


def tensors(result) -> list[torch.Tensor]:
    """What a model predicted for an image."""
    found = []
    for key in ('pred_instances', 'seg_logits'):
        if key in result:
            found += [torch.as_tensor(value).float() for _, value in sorted(result.get(key).items())]
    return found


@pytest.mark.real_images
@pytest.mark.parametrize(
    'task', [pytest.param(task, marks=[pytest.mark.slow] * (task != 'retinanet_swin_l_voc')) for task in REAL]
)
def test_sensitivity_plan_training_delta_merge(task, tmp_path, tool, monkeypatch):
    """Measure, plan, train, write the delta, load it on a fresh base (the same bits), merge it into a checkpoint that
    the stock config loads strictly, without any word of mona_mm: the same predictions on the validation images."""
    monkeypatch.setattr('torch.accelerator.is_available', lambda: False)
    narrow = copy.deepcopy(NARROW | NARROW_TASK[kind(task)])
    narrow |= {'model.backbone.peft.structured.rank': 2, 'model.backbone.peft.num_batches': 2}
    narrow |= {'model.backbone.peft.budget': '3%', 'data_root': str(real_images(REAL[task]))}
    cfg = load_config(str(CONFIGS[f'spt_lora_{task}']), narrow)
    check_data(cfg, ('train', 'val'))
    init_default_scope(cfg.default_scope)
    base = MODELS.build(cfg.model.backbone.base)
    base.init_weights()
    torch.save(dict(state_dict=base.state_dict()), tmp_path / 'base.pth')
    cfg.model.backbone.base.init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth'))
    cfg.test_dataloader = cfg.val_dataloader
    cfg.work_dir, cfg.experiment_name = str(tmp_path / 'work'), os.urandom(4).hex()
    adapt_to_device(cfg)
    make_plan(cfg)
    plan = Plan.load(cfg.model.backbone.peft.plan)
    assert plan.structured and plan.vectors and plan.counts.weights
    assert plan.counts.total <= plan.info['budget_parameters'] == plan.architecture.parameters * 3 // 100
    cfg.dump(tmp_path / 'config.py')
    runner = build_runner(cfg)
    runner.train()
    trained = runner.model.eval()

    (delta,) = [p for p in (tmp_path / 'work').glob('*.delta.safetensors') if not p.name.startswith('best')]
    fresh = MODELS.build(cfg.model)
    mona_mm.load_delta(fresh, delta)
    mine = trained.state_dict()
    assert all(torch.equal(tensor, mine[name]) for name, tensor in fresh.state_dict().items())
    size = sum(p.numel() for p in trained.parameters() if p.requires_grad) * 4
    assert delta.stat().st_size < 2 * size, 'the frozen base is in it'

    merged = str(tmp_path / 'merged.pth')
    status, out, err = tool('delta.py', 'merge', str(tmp_path / 'config.py'), str(delta), merged)
    assert status == 0 and 'stock config loads it' in out, (out, err)
    checkpoint = torch.load(merged, weights_only=True)
    assert 'mona_mm' not in checkpoint['meta']['cfg']
    stock_cfg = Config.fromstring(checkpoint['meta']['cfg'], '.py')
    adapt_to_device(stock_cfg)
    stock = MODELS.build(stock_cfg.model)
    stock.load_state_dict(checkpoint['state_dict'], strict=True)
    stock.eval()
    compared = 0
    with torch.no_grad():
        for batch in runner.val_dataloader:
            for ours, theirs in zip(trained.test_step(batch), stock.test_step(batch), strict=True):
                for a, b in zip(tensors(ours), tensors(theirs), strict=True):
                    assert_near(a, b)
                    compared += a.numel()
    assert compared
