"""What a message on a run that stops needs: the last good checkpoint, the command to go on, the images of a batch."""

import os
import os.path as osp
import shlex
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from mona_mm.compat.runner import loaded_file, resumes

_MOST_NAMES = 16
"""The number of images that a message names."""


def last_checkpoint(runner: Runner) -> str | None:
    """The last whole checkpoint of a run: one that it has written, or that it resumed; None if there is none."""
    # A checkpoint hook names the file before it is written, so another hook notes those that were.
    names = [getattr(hook, 'last_good', None) for hook in runner.hooks]
    names.append(getattr(checkpoint_hook(runner), 'last_ckpt', None))
    names.append(loaded_file(runner) if resumes(runner) else None)
    return next((name for name in names if name and ('://' in name or osp.exists(name))), None)


def checkpoint_hook(runner: Runner) -> CheckpointHook | None:
    """The hook that writes the checkpoints of a run; None if it has none."""
    return next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)


def how_to_go_on(runner: Runner) -> str:
    """A sentence on what is kept of a run that stops now, and on how to continue it."""
    kept = last_checkpoint(runner)
    if kept is None:
        return 'No checkpoint had been written yet.'
    command = resume_command()
    return f'The last good checkpoint is {kept}' + (f'; go on from it with: {command}' if command else '.')


def resume_command() -> str | None:
    """The command line that continues the run of this process; None if it is not run by a ``train.py``."""
    if osp.basename(sys.argv[0]) != 'train.py':
        return None
    kept, arguments = [], iter(sys.argv[1:])
    pending = None
    for argument in arguments:
        if pending is not None and (pending == '--fine-tune' or not argument.startswith('-')):
            pending = None  # the value of the option before
            continue
        pending = argument if argument in ('--resume', '--fine-tune') else None
        if pending is None and not argument.startswith(('--resume=', '--fine-tune=', '--local-rank', '--local_rank')):
            kept.append(argument)
    processes, nodes = os.environ.get('LOCAL_WORLD_SIZE'), os.environ.get('GROUP_WORLD_SIZE', '1')
    launcher = ['python']
    if 'TORCHELASTIC_RUN_ID' in os.environ and nodes == '1':
        launcher = ['torchrun', f'--nproc_per_node={processes}']
    return shlex.join([*launcher, sys.argv[0], *kept, '--resume'])


def image_names(batch: Any) -> str:
    """The paths of the images of a batch, as a loader makes it, in one text; empty if the batch does not name any."""
    names = list(dict.fromkeys(_paths(batch)))
    more = f' and {len(names) - _MOST_NAMES} more' if len(names) > _MOST_NAMES else ''
    return ', '.join(names[:_MOST_NAMES]) + more


def _paths(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key in ('img_path', 'filename') and isinstance(value, str):
                yield value
            else:
                yield from _paths(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _paths(value)
    elif isinstance(getattr(node, 'metainfo', None), Mapping):  # a data sample of any library
        path = node.metainfo.get('img_path')
        yield from [path] if isinstance(path, str) else _paths(path)
