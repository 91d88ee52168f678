"""The whole model that the deltas of a run belong on."""

import os.path as osp

from mmengine.config import Config

from mona_mm.checkpoint.delta_file import read_delta
from mona_mm.errors import MissingFileError


def whole_model_base(cfg: Config, delta: str | None = None) -> str | None:
    """The whole model that a config's run started from, on which its deltas belong; None if it names none.

    That is its ``load_from``, but of a run that was resumed, where ``load_from`` is the checkpoint it continued from
    and may be gone since, what :func:`mona_mm.commands.config.resume_from` kept as ``base_checkpoint``. Where that is
    not there, it may be where ``delta``, one of the run's, says, or beside it.

    Raises:
        MissingFileError: if the file is not there.
    """
    key, file = _base_key(cfg), base_file(cfg)
    if is_gone(file):
        if delta and osp.isfile(delta):
            for place in (read_delta(delta).header.base_file, osp.join(osp.dirname(delta), osp.basename(file))):
                if osp.isfile(place) and not osp.samefile(place, delta):
                    return place
        raise MissingFileError(
            f'{key}={file}: there is no such checkpoint. The run started from it, so its delta belongs on it: say '
            f'where it is now with --cfg-options {key}=/path/to/it'
        )
    return file


def is_gone(file: str | None) -> bool:
    """Whether a config names a local file that is not there."""
    return bool(file) and '://' not in file and not osp.isfile(osp.expanduser(file))


def base_file(cfg: Config) -> str | None:
    """What :func:`whole_model_base` is, wherever it is by now."""
    return cfg.get(_base_key(cfg)) or None


def _base_key(cfg: Config) -> str:
    return 'base_checkpoint' if cfg.get('resume') else 'load_from'
