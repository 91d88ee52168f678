"""The parts of a model that follow another one: a teacher its student, an average what it is of."""

from collections.abc import Iterable

from torch import Size, Tensor, nn

from mona_mm.record import freeze_records


def moving_copies(model: nn.Module) -> dict[str, str]:
    """The parts of ``model`` that follow another one: a teacher its student, a momentum encoder its encoder.

    Such a part was built to train and is kept from it: something in it has a :class:`~mona_mm.record.FreezeRecord` that
    says so, or it is an averaging object (with ``update_parameters``), or the ``teacher`` beside a ``student``. What it
    follows is a child of the model, of the same class and with the same tensors, in which something trains.

    Returns:
        By path of the copy, the path of what it follows.
    """
    followed = {
        name: child for name, child in model.named_children() if any(p.requires_grad for p in child.parameters())
    }
    found: dict[str, str] = {}

    def look(path: str, module: nn.Module, kept_from_training: bool) -> None:
        if not kept_from_training and not any(p.requires_grad for p in module.parameters()):
            kept_from_training = (
                hasattr(module, 'update_parameters')
                or (path == 'teacher' and 'student' in followed)
                or any(record.trainable for _, _, record in freeze_records(module))
            )
        if kept_from_training:
            like = next((name for name, child in followed.items() if alike(child, module)), None)
            if like is not None:
                found[path] = like
                return
        for name, child in module.named_children():
            look(f'{path}.{name}' if path else name, child, kept_from_training)

    look('', model, False)
    return found


def alike(first: nn.Module, second: nn.Module) -> bool:
    """Whether two modules are of one class and have the same tensors, values apart."""
    return type(first) is type(second) and _shapes(first) == _shapes(second)


def _shapes(module: nn.Module) -> dict[str, Size]:
    return {name: t.shape for name, t in module.state_dict().items() if isinstance(t, Tensor)}


def is_under(path: str, parents: Iterable[str]) -> bool:
    """Whether a path is one of ``parents``, or leads into it."""
    return any(f'{path}.'.startswith(f'{parent}.') for parent in parents)
