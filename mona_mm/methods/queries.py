"""Queries for a decoder that a method in a backbone computes from its own parameters (Rein's link)."""

from torch import Tensor, nn

from mona_mm.errors import ConfigError
from mona_mm.methods.base import PeftModule
from mona_mm.record import record_of


def modules_with_queries(backbone: nn.Module) -> list[PeftModule]:
    """The modules of the method in a backbone that computes queries, in the order of the blocks; empty without one.

    Raises:
        ConfigError: if several methods in the backbone compute queries.
    """
    found = []
    for name, paths in record_of(backbone).paths.items():
        modules = [backbone.get_submodule(path) for path in paths]
        if modules and isinstance(modules[0], PeftModule) and modules[0].link is not None:
            found.append((name, modules))
    if len(found) > 1:
        names = ', '.join(name for name, _ in found)
        raise ConfigError(
            f'peft: several methods of {type(backbone).__name__} compute queries for a decoder: {names}. Give `link` '
            'to one of them.'
        )
    return found[0][1] if found else []


def compute_queries(backbone: nn.Module) -> Tensor | None:
    """Compute the queries ``(number, width)`` of the method in a backbone; None if it has no such method.

    They are a function of parameters alone, so no image needs to have passed through the backbone. Their dtype is that
    of the parameters, under autocast too, as if they were parameters of the decoder.
    """
    modules = modules_with_queries(backbone)
    if not modules:
        return None
    return type(modules[0]).queries(modules).to(next(modules[0].parameters()).dtype)


class LinkedQueries(nn.Module):
    """A stand-in for the embedding of a decoder's queries, whose ``weight`` the method in a backbone computes.

    The backbone is no child of it, since its parameters already have a name in the model. It is an ordinary attribute
    all the same, so that a copy or a pickle of the whole model leads to the backbone in that copy.

    Args:
        backbone: the backbone.

    Raises:
        ConfigError: if no method of the backbone, or several, compute queries.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        if not modules_with_queries(backbone):
            raise ConfigError(
                f"The method of {type(backbone).__name__} computes no queries. Set peft=dict(type='Rein', link=256) to "
                'the width of the decoder.'
            )
        self._source = (backbone,)  # in a tuple, since a module that is an attribute would be a child

    @property
    def backbone(self) -> nn.Module:
        """The backbone whose method computes the queries."""
        return self._source[0]

    @property
    def weight(self) -> Tensor:
        """The queries ``(number, width)``."""
        return compute_queries(self.backbone)

    def forward(self, indices: Tensor) -> Tensor:
        """Look up the queries of some indices."""
        return self.weight[indices]

    def extra_repr(self) -> str:
        """Name the class of the backbone."""
        return f'of {type(self.backbone).__name__}'


def check_linked(model: nn.Module) -> None:
    """Check that a decoder of ``model`` reads the queries that methods in its backbones compute.

    Raises:
        ConfigError: if none does: the parameters of the link would never get a gradient, for which
            DistributedDataParallel would wait.
    """
    read = {id(m.backbone) for m in model.modules() if isinstance(m, LinkedQueries)}
    for path, backbone in model.named_modules():
        modules = modules_with_queries(backbone)
        if id(backbone) not in read and any(p.requires_grad for m in modules for p in m.parameters()):
            raise ConfigError(
                f'{path or "the model"}: {type(modules[0]).__name__} has link={modules[0].link}, and no decoder reads '
                "the queries that it makes. Leave link out, or build the model by dict(type='mona_mm.LinkedModel', "
                'base=<the model>) if it has a decoder with queries (Mask2Former).'
            )
