"""Evaluate a checkpoint: python tools/test.py CONFIG CHECKPOINT [--show-dir DIR] [--out FILE] [--cfg-options ...]"""

import os.path as osp

import mona_mm  # noqa: F401  first: it makes the OpenMMLab libraries importable
from mona_mm.cli import build_runner, read_run_config, run, run_parser
from mona_mm.data import check_data
from mona_mm.errors import ConfigError, MissingFileError


def main() -> None:
    parser = run_parser('Evaluate a checkpoint')
    parser.add_argument('checkpoint', help='checkpoint file (.pth)')
    parser.add_argument('--show-dir', help='write a picture of every image here: ground truth left, predictions right')
    parser.add_argument('--out', help='write the predictions to this .pkl file')
    args = parser.parse_args()
    if '://' not in args.checkpoint and not osp.isfile(args.checkpoint):
        raise MissingFileError(f'There is no checkpoint {args.checkpoint}.')
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        raise ConfigError(f'--out {args.out}: predictions are written as .pkl.')
    cfg = read_run_config(args)
    check_data(cfg, ('test',))
    cfg.load_from = args.checkpoint
    if args.show_dir:
        # An absolute path, because the hook would put a relative one below the time-stamped log folder.
        cfg.default_hooks.visualization.update(draw=True, test_out_dir=osp.abspath(args.show_dir))
    runner = build_runner(cfg)
    if args.out:
        from mmdet.evaluation import DumpDetResults

        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=args.out))
    runner.test()


if __name__ == '__main__':
    run(main)
