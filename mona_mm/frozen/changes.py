"""What training changes in a model, and what it leaves as it was."""

from torch import Tensor, nn

from mona_mm.frozen.copies import moving_copies
from mona_mm.hosts import method_names, recomputed_names
from mona_mm.nn.private import NORMS_WITH_STATISTICS

PLACES = '.indices'
"""The end of the names of the places of single weights (SPT)."""


def changing(model: nn.Module) -> set[str]:
    """The names, in the state dict, of what training changes in ``model``.

    These are the parameters that require a gradient, everything of a method, and the buffers of modules that are not
    frozen: of a normalisation layer, if it has parameters that train or none; of any other module, if among the
    parameters of it or of the innermost module around it that has some, one trains. The places of single weights
    (SPT) are not among them: they are the plan's, and a delta has them in its fingerprint. What follows another part
    (a teacher its student) changes where that does, and so do the buffers of what averages it.
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
            names.add(name)  # freeze.train leaves these in training mode
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
    """The tensors in the state dict of a model, without what else a module may keep there."""
    return {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
