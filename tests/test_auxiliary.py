"""The terms that methods add to the loss: in every way of training once, scaled with the loss, and never in silence."""

import copy
import pickle

import pytest
import torch
from conftest import HOSTS
from helpers import assert_equal, assert_near, in_processes
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from torch import nn

import mona_mm
from mona_mm import PeftBackbone, PeftModel
from mona_mm.errors import ConfigError
from mona_mm.methods import CoLin, LinearModule
from mona_mm.methods.auxiliary import auxiliary_losses
from mona_mm.nn.meta import meta_device
from mona_mm.registry import METHODS

COLIN = dict(type='CoLin', bottleneck=12, rank=4)


class Small(BaseModel):
    """A backbone and a head without statistics of a batch, whose loss is a mean over images."""

    def __init__(self, backbone: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = backbone or PeftBackbone(base=HOSTS['mmdet-swin'], peft=COLIN)
        self.head = nn.Conv2d(192, 3, 1)

    def forward(self, inputs, mode='tensor'):
        out = self.head(self.backbone(inputs)[-1])
        return dict(loss_task=out.square().mean(), accuracy=out.mean()) if mode == 'loss' else out


def small(**base) -> Small:
    torch.manual_seed(0)
    model = Small(PeftBackbone(base=dict(HOSTS['mmdet-swin'], **base), peft=COLIN))
    model.backbone.init_weights()
    return model.double()


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def expected_gradients(model: Small, inputs: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """The orthogonality term and the gradients of the loss with it, written anew."""
    model.zero_grad()
    total = 0.0
    for module in (m for m in model.modules() if isinstance(m, CoLin)):
        for q in (module.down.a, module.up.a, module.down.b.T, module.up.b.T):
            total = total + 0.5 * 4 * (q.T @ q - torch.eye(4, dtype=q.dtype)).square().sum()
    (model(inputs).square().mean() + total).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return float(total.detach()), gradients


class Kept(OptimWrapper):
    """Takes no step, so that gradients can be seen."""

    def step(self, **kwargs):
        pass

    def zero_grad(self, **kwargs):
        pass


def wrapper(model: nn.Module, **options) -> Kept:
    return Kept(torch.optim.SGD(trained(model), 1.0), **options)


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('with_cp', [False, True], ids=['plain', 'checkpointing'])
def test_a_training_step(with_cp):
    """The log has the term by its name and in the sum, and the gradients are those of the sum; a recomputed forward
    pass adds nothing."""
    model = small(with_cp=with_cp).eval()
    term, expected = expected_gradients(model, images())
    log = model.train_step(dict(inputs=images()), wrapper(model))
    assert list(log) == ['loss', 'loss_task', 'accuracy', 'loss_orthogonal']
    assert_near(log['loss_orthogonal'], torch.tensor(term, dtype=torch.float64), 1e-12)
    assert_near(log['loss'], log['loss_task'] + log['loss_orthogonal'], 1e-12)
    assert_near(gradients_of(model), expected, 1e-10)


def test_accumulation():
    """Two batches, whose gradients are accumulated, have the term once, as one batch of both has it."""
    model = small().eval()
    _, expected = expected_gradients(model, images())
    accumulating = wrapper(model, accumulative_counts=2)
    accumulating.initialize_count_status(model, 0, 2)
    for part in images().split(2):
        model.train_step(dict(inputs=part), accumulating)
    assert_near(gradients_of(model), expected, 1e-10)


def test_mixed_precision(monkeypatch):
    """The term is computed in float32, and its gradient is scaled as that of the loss."""
    module = 'mmengine.optim.optimizer.amp_optimizer_wrapper'
    monkeypatch.setattr(f'{module}.is_cuda_available', lambda: True)
    monkeypatch.setattr(f'{module}.GradScaler', lambda **options: torch.amp.GradScaler('cpu', **options))
    model = small().float().eval()
    with torch.no_grad():
        model.head.weight.zero_(), model.head.bias.zero_()  # so that the term alone has a gradient
    term, expected = expected_gradients(model, images().float())
    for scale in (1024.0, 512.0):
        amp = AmpOptimWrapper(dtype='bfloat16', loss_scale=scale, optimizer=torch.optim.SGD(trained(model), 0.0))
        monkeypatch.setattr(amp, 'step', lambda **options: None)
        monkeypatch.setattr(amp, 'zero_grad', lambda **options: None)
        model.zero_grad()
        log = model.train_step(dict(inputs=images().float()), amp)
        assert_near(log['loss_orthogonal'], torch.tensor(term))
        assert_near({name: gradient / scale for name, gradient in gradients_of(model).items()}, expected, least=1e-3)


def train_on_a_part(folder: str) -> None:
    """Three steps on this process's part of a batch."""
    torch.distributed.init_process_group('gloo')
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = small().eval()
    ddp = MMDistributedDataParallel(model)  # without find_unused_parameters, it wants one gradient of each parameter
    optim_wrapper = OptimWrapper(torch.optim.SGD(trained(model), 1e-3, momentum=0.9))
    logs = [ddp.train_step(dict(inputs=images()[rank::world]), optim_wrapper) for _ in range(3)]
    terms = torch.stack([log['loss_orthogonal'].detach() for log in logs])
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    torch.save(dict(state, terms=terms), f'{folder}/{world}_{rank}.pt')
    torch.distributed.destroy_process_group()


def test_ddp(tmp_path):
    """Two processes on halves of a batch take three steps and end where one process on all of it does."""
    for world in (1, 2):
        in_processes(world, tmp_path, train_on_a_part, str(tmp_path))
    one, first, second = (torch.load(tmp_path / name) for name in ('1_0.pt', '2_0.pt', '2_1.pt'))
    assert (one['terms'].diff() < 0).all()
    assert_near(first, one, 1e-9)
    assert_equal(first, second)


class Semi(BaseModel):
    """A student and a teacher that follows it, as in mmdet's SemiBaseDetector."""

    def __init__(self) -> None:
        super().__init__()
        self.student = small()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, inputs, mode='tensor'):
        return dict(loss_task=(self.student(inputs) - self.teacher(inputs).detach()).square().mean())


def test_what_does_not_train_adds_nothing():
    """A teacher within the model and a frozen method have no term, and without gradients there is none."""
    model = Semi()
    term = auxiliary_losses(model.student)['loss_orthogonal']
    assert_near(auxiliary_losses(model)['loss_orthogonal'], term)
    log = model.train_step(dict(inputs=images(1)), wrapper(model))
    assert_near(log['loss_orthogonal'], term)
    assert not auxiliary_losses(model.teacher)
    short = PeftBackbone(base=dict(HOSTS['mmdet-swin'], out_indices=(1,)), peft=COLIN)
    terms = [m.auxiliary_losses()['loss_orthogonal'] for m in short.stages[:2].modules() if isinstance(m, CoLin)]
    assert_near(mona_mm.auxiliary_loss(short), sum(terms))  # blocks behind the last output are frozen
    with torch.no_grad():
        assert not auxiliary_losses(model)
        assert 'loss_orthogonal' not in model.parse_losses(model(images(1), mode='loss'))[1]


@pytest.mark.parametrize('clone', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(clone):
    """A copy has the terms of its own parameters."""
    model = small()
    twin = clone(model)
    assert_near(mona_mm.auxiliary_loss(twin), mona_mm.auxiliary_loss(model), 1e-12)
    with torch.no_grad():
        for module in (m for m in twin.modules() if isinstance(m, CoLin)):
            module.up.a.zero_()
    assert mona_mm.auxiliary_loss(twin) > mona_mm.auxiliary_loss(model)


def test_other_models_are_left_alone():
    """Without a method, or with one that adds no term, the losses are parsed as they are."""
    with meta_device():  # where there is no autocast
        assert mona_mm.auxiliary_loss(PeftBackbone(base=HOSTS['mmdet-swin'], peft=COLIN)).is_meta
    for peft in (None, dict(type='Mona', bottleneck=4)):
        model = Small(PeftBackbone(base=HOSTS['mmdet-swin'], peft=peft))
        losses = dict(loss_a=torch.ones(()), metric=torch.ones(()))
        total, log = model.parse_losses(losses)
        assert float(total) == 1 and list(log) == ['loss', 'loss_a', 'metric']
        assert mona_mm.auxiliary_loss(model).item() == 0


class Pull(LinearModule):
    """A third-party method with a term under a name that a test chooses."""

    sites = ('fc1', 'fc2')
    term = 'loss_pull'

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.full((out_channels,), 2.0))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.offset, 2.0)

    def forward(self, x, out, linear):
        return self.offset.expand_as(out)

    def auxiliary_losses(self):
        return {self.term: self.offset.square().mean()}


@pytest.fixture
def pull(monkeypatch):
    monkeypatch.setitem(METHODS.module_dict, 'Pull', Pull)


def test_beside_single_layers(pull):
    """A method of somebody else, beside layers of a head, and another in the backbone: both terms, by name."""
    model = PeftModel(
        base=dict(type=Small, backbone=small().float().backbone), targets=[dict(type='Pull', path='head')]
    )
    losses = auxiliary_losses(model)
    assert list(losses) == ['loss_orthogonal', 'loss_pull'] and float(losses['loss_pull']) == 4
    assert_near(mona_mm.auxiliary_loss(model), losses['loss_orthogonal'] + 4)
    assert 'loss_pull' in model.train_step(dict(inputs=images(1).float()), wrapper(model))


def test_names_of_terms(pull, monkeypatch):
    """mmengine sums what has `loss` in its name: another name is refused, and so is one that the model has itself."""
    model = Small(PeftBackbone(base=HOSTS['mmdet-swin'], peft=dict(type='Pull')))
    with pytest.raises(ConfigError, match="Small has a loss 'loss_pull' of its own"):
        model.parse_losses(dict(loss_pull=torch.ones(())))
    monkeypatch.setattr(Pull, 'term', 'pull')
    with pytest.raises(ConfigError, match='Pull: the term \'pull\'.* must have "loss" in its name'):
        model.parse_losses(dict(loss_task=torch.ones(())))


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """What is logged about terms."""
    messages = []
    monkeypatch.setattr('mona_mm.methods.auxiliary.print_log', lambda message, **options: messages.append(message))
    return messages


def test_a_loop_of_ones_own_is_warned_once(warnings):
    """Training without the term says so at the first step of the optimizer, and names the function that gives it."""
    model = small()
    optimizer = torch.optim.SGD(trained(model), 0.1)
    for _ in range(2):
        model(images(1)).square().mean().backward()
        optimizer.step()
    (message,) = warnings
    assert message.startswith('CoLin: the loss that is trained on lacks loss_orthogonal')
    assert 'mona_mm.auxiliary_loss(model)' in message


@pytest.mark.parametrize('kind', ['added', 'parsed', 'left out', 'another optimizer', 'frozen'])
def test_no_warning(kind, warnings):
    """The term is in the loss, or the method has none, or does not train."""
    peft = dict(COLIN, orthogonality=0) if kind == 'left out' else COLIN
    model = Small(PeftBackbone(base=HOSTS['mmdet-swin'], peft=peft))
    if kind == 'frozen':
        model.backbone.requires_grad_(False)
    parameters = model.head.parameters() if kind == 'another optimizer' else model.parameters()  # as mmengine does
    optimizer = torch.optim.SGD(parameters, 0.1)
    if kind == 'parsed':
        model.train_step(dict(inputs=images(1).float()), OptimWrapper(optimizer))
    else:
        loss = model(images(1).float()).square().mean()
        (loss + mona_mm.auxiliary_loss(model) if kind == 'added' else loss).backward()
        optimizer.step()
    assert not warnings
