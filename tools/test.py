"""Evaluate a checkpoint: python tools/test.py CONFIG CHECKPOINT [--show-dir DIR] [--out FILE] [--tta]"""

import os.path as osp
from collections.abc import Iterable

from mmengine.config import Config
from mmengine.evaluator import DumpResults
from torch import nn

import mona_mm  # noqa: F401  imported first, because it makes the OpenMMLab libraries importable
from mona_mm.checkpoint.base import whole_model_base
from mona_mm.checkpoint.delta_file import SUFFIX
from mona_mm.commands.cli import build_runner, read_run_config, run, run_parser
from mona_mm.config.tta import use_tta
from mona_mm.config.watching import add_watching
from mona_mm.data_check.check import check_data
from mona_mm.errors import ConfigError, MissingFileError
from mona_mm.nn.wrappers import innermost
from mona_mm.reliability.unreadable_images import check_images
from mona_mm.spt_plans.plans import require_plan
from mona_mm.type_names import is_type


def draw_into(cfg: Config, folder: str) -> None:
    """Set the visualization hook of the library to draw every image into a folder.

    Raises:
        ConfigError: if the config has no such hook.
    """
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if not hook:
        raise ConfigError('--show-dir: the config has no default_hooks.visualization, which would draw the pictures.')
    if is_type(hook, 'DetVisualizationHook'):
        hook.update(draw=True, test_out_dir=folder)
    elif is_type(hook, 'SegVisualizationHook'):
        hook.update(draw=True, interval=1)
        cfg.visualizer.save_dir = folder
    else:  # the hook of mmpretrain
        hook.update(enable=True, interval=1, out_dir=folder)


def refuse_equal_names(paths: Iterable[str | None]) -> None:
    """Refuse to draw images of equal file names, since the libraries' hooks name the pictures by them alone.

    Raises:
        ConfigError: if two images in different folders have one name.
    """
    first: dict[str, str] = {}
    for path in filter(None, paths):
        other = first.setdefault(osp.basename(path), path)
        if other != path:
            raise ConfigError(
                f'--show-dir: {other} and {path} have one file name, by which the pictures are named, so that one '
                'would overwrite the other. Give the images names of their own, or leave --show-dir out.'
            )


def dump_metric(file: str, model: nn.Module) -> DumpResults:
    """Make the metric that writes every prediction to a file, with masks of mmdet's detectors as run-length codes."""
    if any(cls.__module__.startswith('mmdet.') for cls in type(model).__mro__):
        from mmdet.evaluation import DumpDetResults

        return DumpDetResults(out_file_path=file)
    return DumpResults(out_file_path=file)


def main() -> None:
    parser = run_parser('Evaluate a checkpoint')
    parser.add_argument('checkpoint', help='whole checkpoint (.pth) or delta (.delta.safetensors)')
    parser.add_argument('--show-dir', help='write a picture of every image here: ground truth left, predictions right')
    parser.add_argument('--out', help='write the predictions to this .pkl file')
    add_watching(parser)
    parser.add_argument('--tta', action='store_true', help='merge the predictions of each image and its mirror image')
    args = parser.parse_args()
    if '://' not in args.checkpoint and not osp.isfile(args.checkpoint):
        raise MissingFileError(f'There is no checkpoint {args.checkpoint}.')
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        raise ConfigError(f'--out {args.out}: predictions are written as .pkl.')
    cfg = read_run_config(args)
    report = check_data(cfg, ('test',))
    check_images()
    if args.tta:
        use_tta(cfg)
    require_plan(cfg, (cfg.work_dir, osp.dirname(args.checkpoint)))
    delta_base = None
    if args.checkpoint.endswith(SUFFIX):
        delta_base = whole_model_base(cfg, args.checkpoint)
    cfg.load_from, cfg.resume = args.checkpoint, False
    if args.show_dir:
        refuse_equal_names(report.splits['test'].paths if 'test' in report.splits else [])
        draw_into(cfg, osp.abspath(args.show_dir))  # a relative path would be in the time-stamped log folder
    runner = build_runner(cfg, delta_base, args.allow_other_base)
    if args.out:
        runner.test_evaluator.metrics.append(dump_metric(args.out, innermost(runner.model)))
    runner.test()


if __name__ == '__main__':
    run(main)
