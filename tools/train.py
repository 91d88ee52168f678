"""Train a model: python tools/train.py CONFIG [--work-dir D] [--resume [PATH]] [--fine-tune CKPT] [--amp]"""

import mona_mm  # noqa: F401  imported first, because it makes the OpenMMLab libraries importable
from mona_mm.checkpoint.base import whole_model_base
from mona_mm.checkpoint.delta_file import SUFFIX
from mona_mm.commands.cli import build_runner, join_process_group, read_run_config, run, run_parser
from mona_mm.commands.config import fine_tune_from, resume_from
from mona_mm.commands.data import check_data
from mona_mm.commands.dry_run import dry_run
from mona_mm.commands.planning import make_plan
from mona_mm.commands.watching import add_watching
from mona_mm.errors import ConfigError


def main() -> None:
    parser = run_parser('Train a model')
    parser.add_argument('--amp', action='store_true', help='train with automatic mixed precision')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate to the real batch size (linear rule)'
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
    add_watching(parser)
    parser.add_argument(
        '--early-stopping',
        type=int,
        metavar='N',
        help='end when the main metric has not improved for N evaluations, and keep the best checkpoint',
    )
    parser.add_argument(
        '--dry-run', action='store_true', help='make three steps, print what memory and time the run needs, and end'
    )
    args = parser.parse_args()
    cfg = read_run_config(args)
    check_data(cfg, ('train', 'val'))
    if args.fine_tune:
        if args.resume:
            raise ConfigError('--fine-tune starts a run, --resume continues one: give one of the two.')
        fine_tune_from(cfg, args.fine_tune)
    resume_from(cfg, args.resume)
    resumes_delta = cfg.get('resume') and cfg.load_from.endswith(SUFFIX)
    delta_base = whole_model_base(cfg, cfg.load_from) if resumes_delta else None
    join_process_group(cfg)
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise ConfigError(f'--auto-scale-lr: {args.config} does not say auto_scale_lr=dict(base_batch_size=...).')
        cfg.auto_scale_lr.enable = True
    if args.dry_run:
        print(dry_run(cfg, delta_base, args.allow_other_base))
        return
    make_plan(cfg)
    build_runner(cfg, delta_base, args.allow_other_base).train()


if __name__ == '__main__':
    run(main)
