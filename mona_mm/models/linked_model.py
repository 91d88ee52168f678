"""Let a decoder use the queries that the method in its backbone computes, as ``type='mona_mm.LinkedModel'`` asks."""

from typing import Any

from torch import nn

from mona_mm.backbone import build_base
from mona_mm.errors import ConfigError
from mona_mm.methods.queries import LinkedQueries, modules_with_queries
from mona_mm.options import checked
from mona_mm.record import record_of
from mona_mm.registry import MODELS

_USUAL = 'query_embed'


@MODELS.register_module()
@checked
def LinkedModel(base: dict[str, Any], queries: str | None = None) -> nn.Module:
    """A stock model whose decoder has the queries of Rein in its backbone in the place of its own.

    The object returned *is* the base, modified in place: the embedding of the decoder's queries is replaced by a
    :class:`~mona_mm.methods.queries.LinkedQueries`, and its parameters are gone. In a Mask2Former the embeddings of the
    positions of the queries, ``query_embed``, are replaced, which are the object queries of DETR; what the queries
    begin as, ``query_feat``, remains and trains.

    Args:
        base: the config of the model, whose backbone is a PeftBackbone with ``peft=dict(type='Rein', link=256)``.
        queries: the path of the embedding to replace; by default that of the only one named ``query_embed``.

    Raises:
        ConfigError: if no backbone in the model, or more than one, computes queries, there is no such embedding, it
            has another number or another width of queries, or the base is itself a FrozenModel or PeftModel.
    """
    model = build_base(base)
    if record_of(model).freeze is not None:
        raise ConfigError(
            'LinkedModel: its base is frozen already, with the embedding that it is to replace. Put it within the '
            "PeftModel or FrozenModel: dict(type='mona_mm.FrozenModel', base=dict(type='mona_mm.LinkedModel', ...))."
        )
    backbones = [(path, m) for path, m in model.named_modules() if modules_with_queries(m)]
    if len(backbones) != 1:
        found = f'several parts of it do ({", ".join(path for path, _ in backbones)})' if backbones else 'none does'
        raise ConfigError(
            f'LinkedModel: a backbone of {type(model).__name__} must compute the queries of its decoder, and {found}. '
            "Its config has type='mona_mm.PeftBackbone' and peft=dict(type='Rein', link=256)."
        )
    path, embedding = _find_embedding(model, queries)
    (_, backbone), *_ = backbones
    linked = LinkedQueries(backbone)
    number, width = linked.weight.shape
    if (number, width) != tuple(embedding.weight.shape):
        raise ConfigError(
            f'LinkedModel: {path} has {embedding.num_embeddings} queries of width {embedding.embedding_dim}, and Rein '
            f'makes {number} of width {width}. Set num_tokens={embedding.num_embeddings} and '
            f"link={embedding.embedding_dim} in peft=dict(type='Rein'), or change the decoder."
        )
    parent, _, name = path.rpartition('.')
    setattr(model.get_submodule(parent), name, linked)
    return model


def _find_embedding(model: nn.Module, path: str | None) -> tuple[str, nn.Embedding]:
    """The embedding at a path, or the only one that has the usual name, with its path."""
    embeddings = {name: m for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    found = [name for name in embeddings if (name.rpartition('.')[2] == _USUAL if path is None else name == path)]
    if len(found) != 1:
        asked = f'queries={path!r} is' if path is not None else f'{len(found) or "none"} of them named {_USUAL!r} are'
        raise ConfigError(
            f'LinkedModel: {asked} in {type(model).__name__}, whose embeddings are {", ".join(embeddings) or "none"}. '
            'Give the path of the one that holds the queries of the decoder, such as '
            "queries='decode_head.query_embed'."
        )
    return found[0], embeddings[found[0]]
