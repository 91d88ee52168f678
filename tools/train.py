"""Train a model: python tools/train.py CONFIG [--data DIR] [--work-dir D] [--batch N|auto] [--resume [PATH]]

Several processes: tools/dist_train.sh CONFIG GPUS [--strategy ddp|fsdp|fsdp2|deepspeed] [...]
"""

import argparse

from mmengine.config import Config
from mmengine.logging import print_log

import mona_mm  # noqa: F401  imported first, because it makes the OpenMMLab libraries importable
from mona_mm.checkpoint.base import whole_model_base
from mona_mm.checkpoint.delta_file import SUFFIX
from mona_mm.commands.batch import batch_argument, set_batch
from mona_mm.commands.cli import build_runner, join_process_group, read_run_config, run, run_parser, show_report
from mona_mm.commands.dry_run import dry_run
from mona_mm.config.load import fine_tune_from, resume_from, skip_nonfinite
from mona_mm.config.recipe import apply_recipe
from mona_mm.config.strategy import STRATEGIES, use_strategy
from mona_mm.config.watching import add_watching
from mona_mm.data_check.check import check_data
from mona_mm.errors import ConfigError
from mona_mm.reliability.failures import explained
from mona_mm.reliability.lock_work_dir import lock_work_dir
from mona_mm.reliability.unreadable_images import check_images
from mona_mm.spt_plans.plans import make_plan


def parse_args() -> argparse.Namespace:
    parser = run_parser('Train a model')
    parser.add_argument('--amp', action='store_true', help='train with automatic mixed precision')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate to the real batch size (linear rule)'
    )
    parser.add_argument(
        '--batch',
        type=batch_argument,
        metavar='N|auto[:GIB]',
        help='images in a step, or as many as the memory has room for (of GIB at most); the learning rate follows',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='PATH',
        help='continue from this checkpoint, or without PATH from the last one in the work dir',
    )
    parser.add_argument(
        '--fine-tune',
        metavar='CHECKPOINT',
        help="start from this model, of the same config but for its classes: the heads' last layers begin anew",
    )
    parser.add_argument(
        '--skip-nonfinite', action='store_true', help='leave out iterations whose loss is not finite, and count them'
    )
    parser.add_argument(
        '--skip-unreadable', action='store_true', help='leave out images that are missing, damaged or cut off'
    )
    parser.add_argument(
        '--strategy',
        choices=STRATEGIES,
        help='how several processes share the model: whole on each (ddp), or its frozen weights sharded (fsdp, fsdp2); '
        "by default mmengine's Runner with ddp",
    )
    add_watching(parser)
    parser.add_argument(
        '--early-stopping',
        type=int,
        metavar='N',
        help='end when the main metric has not improved for N evaluations, and keep the best checkpoint',
    )
    parser.add_argument(
        '--dry-run', action='store_true', help='make a few steps, print what memory and time the run needs, and end'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cfg = read_run_config(args)
    if args.strategy:
        use_strategy(cfg, args.strategy)
    report = check_data(cfg, ('train', 'val'), args.skip_unreadable)
    if args.fine_tune:
        if args.resume:
            raise ConfigError('--fine-tune starts a run, --resume continues one: give one of the two.')
        fine_tune_from(cfg, args.fine_tune)
    resume_from(cfg, args.resume)
    resumes_delta = cfg.get('resume') and cfg.load_from.endswith(SUFFIX)
    delta_base = whole_model_base(cfg, cfg.load_from) if resumes_delta else None
    join_process_group(cfg)
    check_images(args.skip_unreadable)
    if args.skip_nonfinite:
        skip_nonfinite(cfg)
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise ConfigError(f'--auto-scale-lr: {args.config} does not say auto_scale_lr=dict(base_batch_size=...).')
        cfg.auto_scale_lr.enable = True
    settle_batch_and_schedule(cfg, args)
    if args.dry_run:
        print(dry_run(cfg, delta_base, args.allow_other_base))
        return
    with lock_work_dir(cfg.work_dir):
        show_report(report, cfg)
        make_plan(cfg)
        runner = build_runner(cfg, delta_base, args.allow_other_base)
        with explained(runner):
            runner.train()


def settle_batch_and_schedule(cfg: Config, args: argparse.Namespace) -> None:
    """Set the batch that ``--batch`` asks for, and what the config's recipe makes of the data; say both."""
    given = args.cfg_options or {}
    lines = set_batch(cfg, args.batch, given) if args.batch else []
    for line in lines + apply_recipe(cfg, given):
        print_log(line, logger='current')


if __name__ == '__main__':
    run(main)
