"""LoRA, rsLoRA, PiSSA and DoRA against Hugging Face's PEFT: outputs, gradients and merged weights, in float64."""

import copy

import pytest
import torch
from helpers import assert_near
from torch import Tensor, nn

import mona_mm
from mona_mm import PeftModel
from mona_mm.methods.base import start_from_base

peft = pytest.importorskip('peft')

RANK, ALPHA = 3, 2.0


class OneOf(nn.Module):
    """A layer of one of the two kinds, at ``layer``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == 'linear':
            self.layer = nn.Linear(10, 8)
        else:
            self.layer = nn.Conv2d(10, 8, 3, stride=2, padding=1, bias=kind == 'convolution')

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def inputs(kind: str) -> Tensor:
    shape = (2, 5, 10) if kind == 'linear' else (2, 10, 7, 9)
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def theirs(model: nn.Module, **options) -> nn.Module:
    """The model in PEFT, in the precision that it has."""
    config = peft.LoraConfig(target_modules=['layer'], r=RANK, lora_alpha=ALPHA, **options)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """What trains in a model of PEFT, by our names."""
    names = dict(lora_A='down.weight', lora_B='up.weight', lora_magnitude_vector='magnitude')
    return {names[n.split('.')[-3]]: p for n, p in model.named_parameters() if p.requires_grad}


def off_the_start(model: nn.Module) -> None:
    with torch.no_grad():
        for p in parameters_of(model).values():
            p.add_(0.3 * torch.randn_like(p))


def compare(model: nn.Module, other: nn.Module, x: Tensor) -> None:
    """Equal outputs, equal gradients of the input and of all that trains, and equal weights after merging."""
    module = model.layer.peft['weight']
    results = []
    for each, parameters in ((model, dict(module.named_parameters())), (other, parameters_of(other))):
        torch.manual_seed(1)
        out = each(x)
        direction = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
        names = sorted(parameters)
        gradients = torch.autograd.grad((out * direction).sum(), [x, *(parameters[name] for name in names)])
        shapes = [x.shape, *(dict(module.named_parameters())[name].shape for name in names)]
        results.append([out, *(g.reshape(shape) for g, shape in zip(gradients, shapes, strict=True))])
    assert len(results[0]) == 2 + len(list(module.parameters()))
    assert_near(*results, 1e-12)
    if module.is_weight_delta:
        assert_near(mona_mm.merge(model).layer.weight, other.merge_and_unload().layer.weight, 1e-12)


OPTIONS = {
    'lora': dict(),
    'rslora': dict(use_rslora=True),
    'dora': dict(use_dora=True),
    'dora-rslora': dict(use_dora=True, use_rslora=True),
    'lora-dropout': dict(lora_dropout=0.3),
    'dora-dropout': dict(use_dora=True, lora_dropout=0.3),
}


@pytest.mark.parametrize('kind', ['linear', 'convolution', 'convolution without bias'])
@pytest.mark.parametrize('name', OPTIONS)
def test_same_as_huggingface_peft(name, kind):
    """In train mode, with the same random numbers where something is dropped."""
    options = OPTIONS[name]
    target = dict(
        path='layer',
        type='DoRA' if options.get('use_dora') else 'LoRA',
        rank=RANK,
        alpha=ALPHA,
        dropout=options.get('lora_dropout', 0.0),
        use_rslora=options.get('use_rslora', False),
    )
    model = PeftModel(base=dict(type=OneOf, kind=kind), targets=[target]).double()
    stock = OneOf(kind).double()
    stock.load_state_dict(model.state_dict(), strict=False)
    other = theirs(stock, **options)
    start_from_base(model)
    module = model.layer.peft['weight']
    if options.get('use_dora'):
        assert_near(module.magnitude, parameters_of(other)['magnitude'].detach().flatten(), 1e-12)
    off_the_start(other)
    with torch.no_grad():
        for each, values in parameters_of(other).items():
            parameter = module.get_parameter(each)
            parameter.copy_(values.reshape(parameter.shape))
    compare(model.train(), other.train(), inputs(kind))


@pytest.mark.parametrize('use_dora', [False, True], ids=['lora', 'dora'])
@pytest.mark.parametrize('rslora', [False, True], ids=['', 'rslora'])
def test_same_as_pissa(rslora, use_dora):
    """The start from the principal singular vectors, to the signs of the vectors; from the same start, outputs and
    gradients. PEFT takes the part out of the base, which here stays as it is."""
    target = dict(path='layer', rank=RANK, alpha=ALPHA, init='principal', use_rslora=rslora)
    target['type'] = 'DoRA' if use_dora else 'LoRA'
    model = PeftModel(base=dict(type=OneOf, kind='linear'), targets=[target])
    stock = OneOf('linear')
    stock.load_state_dict(model.state_dict(), strict=False)
    weight = copy.deepcopy(stock.layer.weight.detach())
    other = theirs(stock, init_lora_weights='pissa', use_rslora=rslora, use_dora=use_dora)
    module, start = model.layer.peft['weight'], parameters_of(other)
    assert_near(module.up.weight @ module.down.weight, start['up.weight'] @ start['down.weight'])
    assert_near(weight - module.scale * module.initial_up @ module.initial_down, stock_weight(other))

    model.double()
    other.double()
    with torch.no_grad():
        model.layer.weight.copy_(stock_weight(other) + module.scale * start['up.weight'] @ start['down.weight'])
        module.initial_down.copy_(start['down.weight'])
        module.initial_up.copy_(start['up.weight'])
        off_the_start(other)
        for each, values in parameters_of(other).items():
            module.get_parameter(each).copy_(values)
    compare(model, other, inputs('linear'))


def stock_weight(model: nn.Module) -> Tensor:
    """The weight of the base in a model of PEFT."""
    return model.base_model.model.layer.base_layer.weight.detach()
