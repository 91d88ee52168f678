"""The published numbers that are shipped with the package."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from mona_mm.reproduce.tasks import TASKS, Entry, Task


@cache
def published_results() -> dict[str, Any]:
    """The content of ``published.json``: scores in percent with their grades, or None for a number not found."""
    return json.loads((Path(__file__).resolve().parents[1] / 'published.json').read_text(encoding='utf-8'))


def published_scores(task: Task, method: str) -> dict[str, Entry]:
    """The published scores of a method on a task, by metric; an entry is None if the number was not found.

    Metrics for which no method has a published score are left out.
    """
    if task.published is None:
        return {}
    content = published_results()[task.published] if isinstance(task.published, str) else task.published
    of_method = content.get(method)
    if isinstance(of_method, dict) and not of_method.keys() & task.metrics.keys():
        of_method = of_method.get(task.name)
    if isinstance(of_method, dict):
        return {score: of_method[score] for score in task.metrics if score in of_method}
    return {next(iter(task.metrics)): of_method}


def published_trainable(method: str, task: str, size: str | None = None) -> int | None:
    """The published number of backbone parameters that a method trains on a task; None if it is not known.

    Args:
        method: the name of the method in the tables.
        task: the name of one of :data:`~mona_mm.reproduce.tasks.TASKS`.
        size: the size of the Swin, such as ``'swin_t'``; by default the one in the task's main configs.
    """
    published = published_results()
    size, group = size or TASKS[task].size, TASKS[task].parameters
    exact = published['trainable_params_backbone_other_tasks'][group].get(size, {}).get(method) if group else None
    entry = published['trainable_params_backbone'].get(size, {}).get(method)
    return exact if exact is not None else entry[0] if entry else None
