"""Find the parts of a model that follow another part: a teacher its student, an average its model."""

from collections.abc import Iterable

from torch import Size, Tensor, nn

from mona_mm.record import freeze_records


def moving_copies(model: nn.Module) -> dict[str, str]:
    """Find the parts of ``model`` that follow another part: a teacher its student, a momentum encoder its encoder.

    Nothing trains in such a part although it was built to train: a :class:`~mona_mm.record.FreezeRecord` in it names
    parameters to train, or it is an averaging object (with ``update_parameters``), or it is the ``teacher`` beside a
    ``student``. The part that it follows is a child of the model of the same class, with tensors of the same shapes, in
    which something trains.

    Returns:
        The path of the followed part, by path of the copy.
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
    """Whether two modules have the same class, and tensors of the same names and shapes."""
    return type(first) is type(second) and _shapes(first) == _shapes(second)


def _shapes(module: nn.Module) -> dict[str, Size]:
    return {name: t.shape for name, t in module.state_dict().items() if isinstance(t, Tensor)}


def is_under(path: str, parents: Iterable[str]) -> bool:
    """Whether a path is one of ``parents`` or lies under one of them."""
    return any(f'{path}.'.startswith(f'{parent}.') for parent in parents)
