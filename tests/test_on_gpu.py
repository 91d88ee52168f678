"""On a CUDA device: fast forms are the plain ones, a step never waits for the device, and CUDA graphs, torch.compile
and channels-last images give what a plain step gives."""

import pytest
import torch
from conftest import HOSTS, needs_gpu
from fast_forms import backbone_pair, step
from helpers import assert_near, pairwise
from suite import METHOD_CONFIGS, is_common, supports

from mona_mm import PeftBackbone
from mona_mm.benchmark.backbone import SWINS, build_backbone
from mona_mm.nn import choice

pytestmark = needs_gpu

SWIN_T = dict(type='mmdet.SwinTransformer', drop_path_rate=0.0, **SWINS['t'])


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    """Convolutions in float32 take no shortcut of TensorFloat-32."""
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)


def deterministic(method):
    """The config of a method without dropout."""
    methods = method if isinstance(method, list) else [method]
    return [dict(m, dropout=0.0) if m['type'] == 'Mona' else m for m in methods]


@pytest.mark.parametrize(('host', 'method'), pairwise(HOSTS, METHOD_CONFIGS, possible=supports, common=is_common))
def test_fast_form_is_the_plain_form(host, method):
    """Outputs and all gradients, with the same random numbers."""
    plain, fast = (model.cuda() for model in backbone_pair(host, peft=method))
    assert_near(step(fast), step(plain), 1e-4, least=1e-2)


@pytest.mark.parametrize('host', ['mmdet-swin', 'mmpretrain-vit'])
def test_measured_forms_are_the_plain_form(host):
    """With the forms that are fastest here, Triton kernels among them; what was chosen is known by name."""
    plain, fast = (
        model.cuda() for model in backbone_pair(HOSTS[host], peft=dict(type='Mona', bottleneck=32, dropout=0.0))
    )
    expected = step(plain)
    choice.measure(True)
    assert_near(step(fast), expected, 1e-4, least=1e-2)
    assert any(chosen[0] == 'mona_cuda' for chosen in choice.chosen())


def optimised(model: torch.nn.Module, x: torch.Tensor, dtype: torch.dtype | None):
    """A function that makes a whole training step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run() -> None:
        with torch.autocast('cuda', dtype or torch.bfloat16, enabled=dtype is not None):
            outs = list(model(x))
        sum(out.float().square().mean() for out in outs).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


@pytest.mark.parametrize('dtype', [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize('name', [*METHOD_CONFIGS, 'spt', 'full'])
@pytest.mark.parametrize('host', ['mmdet-swin', 'mmpretrain-vit'])
def test_no_step_waits_for_the_device(host, name, dtype):
    """After the first steps, in which forms are measured, nothing synchronises: not .item(), not nonzero, no copy."""
    if name in METHOD_CONFIGS:
        model = PeftBackbone(HOSTS[host], METHOD_CONFIGS[name])
    else:
        model = build_backbone(name, HOSTS[host])
    choice.measure(True)
    run = optimised(model.cuda().train(), torch.randn(2, 3, 64, 64, device='cuda'), dtype)
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode('default')


def loss(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A sum of the outputs with different weights: squares of what a LayerNorm returns add up to a constant."""
    return sum((out * torch.arange(out.numel(), device=out.device).view(out.shape).cos()).sum() for out in model(x))


def gradients(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss(model, x).backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize('measures', [False, True])
def test_a_captured_training_step(measures):
    """A CUDA graph of forward and backward of Swin-T with Mona, replayed for other images."""
    model = PeftBackbone(SWIN_T, deterministic(METHOD_CONFIGS['mona'])).cuda().train()
    choice.measure(measures)
    x, other = (torch.randn(2, 3, 224, 224, device='cuda') for _ in range(2))
    expected = gradients(model, other)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            gradients(model, x)
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss(model, x).backward()
    x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert_near([p.grad for p in model.parameters() if p.requires_grad], expected, 1e-4, least=1e-2)


def test_channels_last():
    """Images and weights in channels-last format."""
    method = deterministic(METHOD_CONFIGS['mona'])
    model = PeftBackbone(dict(HOSTS['mmdet-swin'], drop_path_rate=0.0), method).cuda().train()
    x = torch.randn(2, 3, 64, 96, device='cuda')
    expected = gradients(model, x)
    model.to(memory_format=torch.channels_last)
    assert_near(gradients(model, x.contiguous(memory_format=torch.channels_last)), expected, 1e-4, least=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['mona', 'lora'])
def test_compiled(name):
    """torch.compile of a backbone: the outputs and gradients of the one that is not compiled."""
    base, method = dict(HOSTS['mmdet-swin'], drop_path_rate=0.0), deterministic(METHOD_CONFIGS[name])
    plain, compiled = (PeftBackbone(base, method, compile=compiles).cuda().train() for compiles in (False, True))
    compiled.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64, device='cuda')
    assert_near(gradients(compiled, x), gradients(plain, x), 1e-3, least=1e-2)
