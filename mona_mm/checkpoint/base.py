"""Find the checkpoint of the whole model that the deltas of a run need as their base."""

import os.path as osp

from mmengine.config import Config

from mona_mm.checkpoint.delta_file import read_delta
from mona_mm.errors import MissingFileError


def whole_model_base(cfg: Config, delta: str | None = None) -> str | None:
    """Find the whole model from which the run of a config started; its deltas need it as their base.

    It is the config's ``load_from``. In a resumed run, whose ``load_from`` is the checkpoint that it continued from,
    it is the ``base_checkpoint`` that :func:`mona_mm.config.load.resume_from` has kept. If that file no longer
    exists, the file that ``delta`` names is tried, and one of the same name beside the delta.

    Args:
        cfg: the config of the run.
        delta: a delta of the run.

    Returns:
        The file; None if the config names none.

    Raises:
        MissingFileError: if the file does not exist.
    """
    key, file = _base_key(cfg), base_file(cfg)
    if is_gone(file):
        if delta and osp.isfile(delta):
            for place in (read_delta(delta).header.base_file, osp.join(osp.dirname(delta), osp.basename(file))):
                if osp.isfile(place) and not osp.samefile(place, delta):
                    return place
        raise MissingFileError(
            f'{key}={file}: there is no such checkpoint. The run started from it, so its delta needs it as base. Give '
            f'its new place with --cfg-options {key}=/path/to/it'
        )
    return file


def is_gone(file: str | None) -> bool:
    """Whether a file that a config names is local and does not exist."""
    return bool(file) and '://' not in file and not osp.isfile(osp.expanduser(file))


def base_file(cfg: Config) -> str | None:
    """The whole model from which the run of a config started, whether or not the file exists; None if there is none."""
    return cfg.get(_base_key(cfg)) or None


def _base_key(cfg: Config) -> str:
    return 'base_checkpoint' if cfg.get('resume') else 'load_from'
