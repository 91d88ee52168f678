"""Decide what SPT trains: python tools/spt_sensitivity.py CONFIG --budget 0.4M [--out plan.safetensors] [--plot DIR]

The tool measures the sensitivity of the config's base with the config's own data and losses, and writes the plan for a
budget.
"""

import os.path as osp

from mmengine.dist import is_main_process

import mona_mm  # noqa: F401  imported first, because it makes the OpenMMLab libraries importable
from mona_mm.commands.cli import join_process_group, new_file, read_run_config, run, run_parser
from mona_mm.data_check.check import check_data, sensitivity_split
from mona_mm.spt.allocation import RULES, allocate, parse_budget
from mona_mm.spt.plot import plot_plan, plot_sensitivity
from mona_mm.spt.sensitivity import Sensitivity
from mona_mm.spt.structured import STRUCTURED
from mona_mm.spt_plans.plans import PLAN_FILE, spt_config
from mona_mm.spt_plans.sensitivity import measure


def main() -> None:
    parser = run_parser('Measure the sensitivity of a backbone and plan what trains under a budget')
    parser.add_argument('--budget', required=True, help='trained parameters of the backbone: 0.4M, 400k or 0.5%%')
    parser.add_argument('--out', type=new_file, help='the plan (default: plan.safetensors in the work dir)')
    parser.add_argument('--num-batches', type=int, default=16, help='batches of the data (default: 16)')
    parser.add_argument('--per-sample', action='store_true', help="square every image's gradient, not every batch's")
    parser.add_argument('--seed', type=int, help="of the data's order, heads and dropout (default: the config's, or 0)")
    parser.add_argument(
        '--structured', choices=(*STRUCTURED, 'none'), help="structured module (default: the config's, or LoRA)"
    )
    parser.add_argument('--rule', choices=RULES, default='budget', help='how weights are chosen (default: budget)')
    parser.add_argument('--alpha', type=float, default=10.0, help='of the structured modules (default: 10)')
    parser.add_argument('--beta', type=float, default=5.0, help='of the vectors that train whole (default: 5)')
    parser.add_argument('--no-structured-vectors', action='store_true', help='let no vector train whole')
    parser.add_argument('--structured-only', action='store_true', help='no single weights')
    parser.add_argument(
        '--save-sensitivity', type=new_file, metavar='FILE', help='keep the sensitivity for plans of other budgets'
    )
    parser.add_argument('--sensitivity', metavar='FILE', help='use a kept one; measure nothing')
    parser.add_argument('--plot', metavar='DIR', help='write pictures of the sensitivity and the plan here')
    args = parser.parse_args()
    cfg = read_run_config(args)
    structured = (spt_config(cfg) or {}).get('structured', dict(type='LoRA'))
    if args.structured not in (None, (structured or {}).get('type', 'none')):
        structured = None if args.structured == 'none' else dict(type=args.structured)

    out = args.out or new_file(osp.join(cfg.work_dir, PLAN_FILE))
    if args.sensitivity:
        sensitivity = Sensitivity.load(args.sensitivity)
    else:
        parse_budget(args.budget, 1 << 62)  # a misspelt budget is better reported before measuring than after
        check_data(cfg, (sensitivity_split(cfg),))
        join_process_group(cfg)
        sensitivity = measure(cfg, args.num_batches, args.per_sample, args.seed)
    if not is_main_process():
        return
    if args.save_sensitivity:
        sensitivity.save(args.save_sensitivity)
        print(f'Sensitivity: {args.save_sensitivity}')
    plan = allocate(
        sensitivity,
        args.budget,
        structured,
        rule=args.rule,
        alpha=args.alpha,
        beta=args.beta,
        structured_vectors=not args.no_structured_vectors,
        structured_only=args.structured_only,
    )
    plan.save(out)
    print(f'{plan.describe()} (budget: {plan.info["budget_parameters"]:,})\nPlan: {out}')
    if args.plot:
        print('Pictures:', *plot_sensitivity(sensitivity, args.plot), plot_plan(plan, args.plot))


if __name__ == '__main__':
    run(main)
