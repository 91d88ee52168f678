"""Count what trains, per config: python tools/count_params.py CONFIG [CONFIG ...] [--json]"""

import argparse
import json

import mona_mm  # noqa: F401  first: it makes the OpenMMLab libraries importable
from mona_mm.cli import run
from mona_mm.config import load_config
from mona_mm.freeze import count_trainable
from mona_mm.meta import build_on_meta


def main() -> None:
    parser = argparse.ArgumentParser(description='Count parameters, without allocating any')
    parser.add_argument('configs', nargs='+', metavar='CONFIG', help='config files')
    parser.add_argument('--json', action='store_true', help='print a list of objects in place of tables')
    args = parser.parse_args()
    rows = []
    for file in args.configs:
        model = build_on_meta(load_config(file))
        count = count_trainable(model)
        rows.append(
            dict(
                config=file,
                method=count.method,
                total=count.total,
                trainable=count.trainable,
                backbone_total=count.backbone_total,
                backbone_trainable=count.backbone_trainable,
            )
        )
        if not args.json:
            print(f'{file}\n{count.table()}\n')
    if args.json:
        print(json.dumps(rows, indent=2))


if __name__ == '__main__':
    run(main)
