"""Count the parameters that train: python tools/count_params.py CONFIG [CONFIG ...] [--json] [--cfg-options ...]

With --activations, the tool also builds each model and measures, on one image, what a backbone keeps for the backward
pass if only its later blocks train. With --hosts, the tool lists the backbones that can host a method: python
tools/count_params.py --hosts [--json]
"""

import argparse
import json
import os.path as osp
from dataclasses import asdict
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import MODELS

import mona_mm  # noqa: F401  imported first, because it makes the OpenMMLab libraries importable
from mona_mm.catalogue.hosts import backbone_rows, render_hosts
from mona_mm.commands.cli import add_cfg_options, data_of, run
from mona_mm.config.build import build_on_meta, freeze_by_hooks
from mona_mm.config.load import default_work_dir, load_config
from mona_mm.frozen.activations import KeptActivations, measure_activations, training_size
from mona_mm.frozen.count import backbone_path, count_trainable
from mona_mm.spt_plans.plans import PLAN_FILE, find_plan, find_spt, spt_config
from mona_mm.type_names import enter_scope


def count(file: str, cfg: Config, activations: bool = False) -> tuple[dict[str, Any], str]:
    """Count the parameters of a config, and what it keeps for the backward pass; return them with the text to print."""
    counted = count_trainable(build_on_meta(cfg))
    row = dict(
        config=file,
        method=counted.method,
        total=counted.total,
        trainable=counted.trainable,
        backbone_total=counted.backbone_total,
        backbone_trainable=counted.backbone_trainable,
    )
    if not activations:
        return row, counted.table()
    kept = measure(cfg)
    row['activations'] = kept and asdict(kept)
    return row, f'{counted.table()}\n{kept.text() if kept else "It trains from the first block on, or in none."}'


def measure(cfg: Config) -> KeptActivations | None:
    """Measure what the backbone of a config keeps for the backward pass, by :func:`measure_activations`."""
    enter_scope(cfg)
    model = MODELS.build(cfg.model)
    freeze_by_hooks(model, cfg)
    backbone = model.get_submodule(backbone_path(model)).to(get_device()).train()
    return measure_activations(backbone, training_size(cfg))


def count_without_plan(file: str, cfg: Config) -> tuple[dict[str, Any], str]:
    """Count an SPT config that has no plan without SPT, as :func:`count` does; what trains is not known yet."""
    _, backbone, spt = find_spt(cfg)
    budget, peft = spt.get('budget'), backbone['peft']
    others = [method for method in peft if method is not spt] if isinstance(peft, list | tuple) else []
    backbone.update(peft=others or None, trainable='none')
    row, _ = count(file, cfg)
    method = '+'.join([row['method'], 'SPT'] if others else ['SPT'])
    row |= dict(method=method, trainable=None, backbone_trainable=None, budget=budget)
    line = (
        f'{method}, budget {budget}: - trainable of {row["backbone_total"]:,} in the backbone base, '
        f'- of {row["total"]:,} in the model; there is no {PLAN_FILE} yet (tools/train.py and '
        'tools/spt_sensitivity.py make it)'
    )
    return row, line


def main() -> None:
    parser = argparse.ArgumentParser(description='Count parameters, without allocating any')
    parser.add_argument('configs', nargs='*', metavar='CONFIG', help='config files')
    parser.add_argument('--hosts', action='store_true', help='list every backbone of the libraries and its sites')
    parser.add_argument('--activations', action='store_true', help='measure what is kept for the backward pass, too')
    parser.add_argument('--json', action='store_true', help='print a list of objects in place of tables')
    add_cfg_options(parser)
    args = parser.parse_args()
    if args.hosts == bool(args.configs):
        parser.error('give config files, or --hosts alone')
    if args.hosts:
        found = backbone_rows()
        print(json.dumps([asdict(row) for row in found], indent=2) if args.json else render_hosts(found))
        return
    rows = []
    for file in args.configs:
        cfg = load_config(file, args.cfg_options, data_of(args), write_data=False)
        spt = spt_config(cfg)
        plan = find_plan(cfg, (osp.dirname(file), default_work_dir(cfg, file)))
        planned = spt is None or plan is not None
        if plan is not None:
            spt.plan = plan
        row, text = count(file, cfg, args.activations) if planned else count_without_plan(file, cfg)
        rows.append(row)
        if not args.json:
            print(f'{file}\n{text}\n')
    if args.json:
        print(json.dumps(rows, indent=2))


if __name__ == '__main__':
    run(main)
