"""Options that any config takes: TensorBoard and Weights & Biases, scores of each class, early stopping."""

import argparse
import importlib
import os.path as osp
from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.config import Config, ConfigDict

from mona_mm.config.run_hooks import checkpoint_hook
from mona_mm.errors import ConfigError, UserError
from mona_mm.type_names import is_type, type_name

BACKENDS = dict(
    tensorboard=('TensorboardVisBackend', 'torch.utils.tensorboard'),
    wandb=('WandbVisBackend', 'wandb'),
)
"""What a run can be watched with: the type of mmengine's backend, and the module that it needs."""

_MONITORS = dict(
    CocoMetric='coco/{}_mAP',
    VOCMetric='pascal_voc/mAP',
    IoUMetric='mIoU',
    Accuracy='accuracy/top1',
    MultiLabelMetric='multi-label/f1-score',
    VOCMultiLabelMetric='multi-label/f1-score',
    VOCAveragePrecision='multi-label/mAP',
    AveragePrecision='multi-label/mAP',
)
"""The metric by which runs are compared, by the class of the evaluator."""


def add_watching(parser: argparse.ArgumentParser) -> None:
    """Add the options of this module to a command that runs a config."""
    parser.add_argument(
        '--watch', nargs='+', choices=list(BACKENDS), metavar='WHERE', help=f'log for {" or ".join(BACKENDS)} too'
    )
    parser.add_argument('--classwise', action='store_true', help='let the evaluators give the scores of each class')


def apply_watching(cfg: Config, args: argparse.Namespace) -> None:
    """Apply the options of this module, those that the command has, to a config in place."""
    if getattr(args, 'watch', None):
        watch(cfg, args.watch)
    if getattr(args, 'classwise', False):
        score_each_class(cfg)
    if getattr(args, 'early_stopping', None) is not None:
        stop_early(cfg, args.early_stopping)


def watch(cfg: Config, names: Sequence[str]) -> None:
    """Let a run write its losses, learning rates and metrics for TensorBoard or Weights & Biases too, in place.

    Raises:
        UserError: if a package is not installed, or not with all that it needs.
    """
    if not cfg.get('visualizer'):
        cfg.visualizer = dict(type='Visualizer', name='visualizer')
    backends = list(dict.get(cfg.visualizer, 'vis_backends') or [dict(type='LocalVisBackend')])
    for name in names:
        backend, module = BACKENDS[name]
        try:
            importlib.import_module(module)
        except ImportError:
            raise UserError(f'--watch {name} needs a package: pip install {name}') from None
        if not any(is_type(existing, backend) for existing in backends):
            options = {}
            if name == 'wandb':
                options = dict(init_kwargs=dict(project='mona_mm', name=osp.basename(osp.normpath(cfg.work_dir))))
            backends.append(ConfigDict(type=backend, **options))
    cfg.visualizer['vis_backends'] = backends


def score_each_class(cfg: Config) -> None:
    """Let the evaluators of a config give the scores of each class, in place."""
    for split in ('val', 'test'):
        metrics = list(_metrics(cfg, split))
        for metric in metrics:
            if is_type(metric, 'CocoMetric', 'LVISMetric'):
                metric['classwise'] = True
        is_classifier = any(is_type(metric, 'Accuracy') for metric in metrics)
        if is_classifier and not any(is_type(metric, 'SingleLabelMetric') for metric in metrics):
            of_class = dict(type='SingleLabelMetric', items=('precision', 'recall', 'f1-score'), average=None)
            cfg[f'{split}_evaluator'] = [*metrics, of_class]


def stop_early(cfg: Config, patience: int) -> None:
    """Let training end when the main metric has not improved for ``patience`` evaluations, in place, and keep the best
    checkpoint.

    Raises:
        ConfigError: if the config does not say which metric that is.
    """
    if patience < 1:
        raise ConfigError(f'--early-stopping {patience}: must be at least 1, a number of evaluations.')
    checkpoint = checkpoint_hook(cfg)
    monitor = checkpoint.get('save_best')
    if not isinstance(monitor, str) or monitor == 'auto':
        monitor = main_metric_of(cfg)
    checkpoint['save_best'] = monitor
    checkpoint.setdefault('rule', 'greater')
    hooks = [hook for hook in cfg.get('custom_hooks') or [] if not is_type(hook, 'EarlyStoppingHook')]
    stop = dict(type='EarlyStoppingHook', monitor=monitor, rule=checkpoint['rule'], patience=patience, min_delta=0.0)
    cfg.custom_hooks = [*hooks, stop]


def main_metric_of(cfg: Config) -> str:
    """The name of the metric by which runs of a config are compared.

    Raises:
        ConfigError: if its evaluator is of none of the known classes.
    """
    found = [type_name(metric.get('type')) for metric in _metrics(cfg, 'val')]
    for metric in _metrics(cfg, 'val'):
        monitor = _MONITORS.get(type_name(metric.get('type')))
        if monitor is not None:
            kinds = metric.get('metric', 'bbox')
            return monitor.format('segm' if 'segm' in ([kinds] if isinstance(kinds, str) else kinds) else 'bbox')
    raise ConfigError(
        f'--early-stopping: of {", ".join(found) or "no metric"} it is not known which value is the main one. Name it '
        'with --cfg-options default_hooks.checkpoint.save_best=NAME'
    )


def _metrics(cfg: Config, split: str) -> Iterator[dict[str, Any]]:
    evaluator = cfg.get(f'{split}_evaluator') or []
    yield from [evaluator] if isinstance(evaluator, dict) else evaluator
