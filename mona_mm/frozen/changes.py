"""Tell which tensors of a model training changes."""

from torch import Tensor, nn

from mona_mm.frozen.copies import moving_copies
from mona_mm.hosts import method_names, recomputed_names
from mona_mm.nn.private import NORMS_WITH_STATISTICS

PLACES = '.indices'
"""The ending of the names of the buffers that hold the places of single weights (SPT)."""


def changing(model: nn.Module) -> set[str]:
    """The names, in the state dict, of the tensors that training changes in ``model``.

    These are the parameters that require a gradient, all tensors of a method, and the buffers of modules that are not
    frozen. A normalisation layer is not frozen if it has no parameters or one of them trains; any other module, if a
    parameter of it, or of the innermost module around it that has parameters, trains. The places of single weights
    (SPT) are left out: they belong to the plan, and a delta has them in its fingerprint. A part that follows another
    (a teacher its student) changes where the other does, and so do the buffers of a module that averages.
    """
    method = method_names(model)
    places = {name for name in method if name.endswith(PLACES)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {name for name, p in parameters.items() if p.requires_grad} | method - places
    state = state_tensors(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in state.keys() - names - parameters.keys():
        path = name.rpartition('.')[0]
        module = modules[path]
        if name in places or name.endswith(recomputed_names()):
            continue
        if isinstance(module, NORMS_WITH_STATISTICS) and not module.affine:
            names.add(name)  # frozen.rules.train leaves these in training mode
            continue
        while path and next(module.parameters(), None) is None:
            path = path.rpartition('.')[0]
            module = modules[path]
        if any(p.requires_grad for p in module.parameters()):
            names.add(name)
    for copy, followed in moving_copies(model).items():
        inside = {name for name in state if name.startswith(f'{copy}.')}
        names -= inside
        names |= {name for name in inside if followed + name.removeprefix(copy) in names}
        names |= {name for name in state if copy.startswith(f'{name.rpartition(".")[0]}.') and name not in parameters}
    return names & state.keys()


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors in the state dict of a model, without objects of other kinds that a module may keep there."""
    return {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
