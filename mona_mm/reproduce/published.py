"""The published numbers that are shipped with the package."""

import json
from functools import cache
from pathlib import Path
from typing import Any

DEFAULT_SIZE = {'coco': 'swin_b'}  # every other task: swin_l


@cache
def published_results() -> dict[str, Any]:
    """The content of ``published.json``: scores in percent with their grades; None is a number that was not found."""
    return json.loads((Path(__file__).resolve().parents[1] / 'published.json').read_text(encoding='utf-8'))


def published_trainable(method: str, task: str, size: str | None = None) -> int | None:
    """How many backbone parameters a method trains on a task, as published; None where that is not known."""
    published = published_results()
    size = size or DEFAULT_SIZE.get(task, 'swin_l')
    other = published['trainable_params_backbone_other_tasks']
    group = {'coco': None, 'ade20k': None, 'voc': 'voc'}.get(task, 'classification')
    exact = other[group].get(size, {}).get(method) if group else None
    entry = published['trainable_params_backbone'].get(size, {}).get(method)
    return exact if exact is not None else entry[0] if entry else None
