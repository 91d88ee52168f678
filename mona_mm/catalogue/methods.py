"""What tables, pages, pictures and the model index say about each method, in one place."""

from dataclasses import dataclass

_RULES = 'mona_mm/frozen/rules.py'
_SPT = 'mona_mm/spt/method.py'


@dataclass(frozen=True)
class Paper:
    """A paper.

    Args:
        title: its title.
        address: the web address of its page.
    """

    title: str
    address: str


@dataclass(frozen=True)
class CatalogueEntry:
    """What is said about a method.

    Args:
        title: the name of the method in the model index.
        code: the file that defines it, relative to the root of the project.
        paper: the paper that it is cited with; Mona's, which defines and measures them, for methods without their own.
        colour: its colour in all pictures.
        type: the registered name of its class; empty for a rule, which only selects parameters of the base.
        in_a_line: what it computes, for the table of the README; words where the formula is long, and empty for a rule.
        rule: the rule by which it trains parameters of the base beside its own, as published.
        published: whether the published tables have, or could have, a score of it.
    """

    title: str
    code: str
    paper: Paper
    colour: str
    type: str = ''
    in_a_line: str = ''
    rule: str = ''
    published: bool = True


_MONA_PAPER = Paper(
    '5%>100%: Breaking Performance Shackles of Full Fine-Tuning on Visual Recognition Tasks',
    'https://arxiv.org/abs/2408.08345',
)
_SPT_PAPER = Paper('Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning', 'https://arxiv.org/abs/2303.08566')
_OF_SPT = dict(
    type='SPT',
    in_a_line='LoRA, DoRA, Adapter, Adapter+ or Mona and single weights where the task is sensitive, within a budget',
    published=False,
)

CATALOGUE = {
    'full': CatalogueEntry(
        'Full',
        _RULES,
        Paper(
            'Swin Transformer: Hierarchical Vision Transformer using Shifted Windows',
            'https://arxiv.org/abs/2103.14030',
        ),
        '#000000',
    ),
    'fixed': CatalogueEntry('Fixed', _RULES, _MONA_PAPER, '#ddaa33'),
    'bitfit': CatalogueEntry(
        'BitFit',
        _RULES,
        Paper(
            'BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models',
            'https://arxiv.org/abs/2106.10199',
        ),
        '#332288',
    ),
    'norm_tuning': CatalogueEntry('NormTuning', _RULES, _MONA_PAPER, '#44bbaa'),
    'partial_1': CatalogueEntry('Partial-1', _RULES, _MONA_PAPER, '#885533'),
    'adapter': CatalogueEntry(
        'Adapter',
        'mona_mm/methods/adapter.py',
        Paper('Parameter-Efficient Transfer Learning for NLP', 'https://arxiv.org/abs/1902.00751'),
        '#4477aa',
        type='Adapter',
        in_a_line='x + up(gelu(down(x)))',
    ),
    'lora': CatalogueEntry(
        'LoRA',
        'mona_mm/methods/lora.py',
        Paper('LoRA: Low-Rank Adaptation of Large Language Models', 'https://arxiv.org/abs/2106.09685'),
        '#228833',
        type='LoRA',
        in_a_line='Wx + (α/r)·BAx',
    ),
    'adaptformer': CatalogueEntry(
        'AdaptFormer',
        'mona_mm/methods/adaptformer.py',
        Paper(
            'AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition',
            'https://arxiv.org/abs/2205.13535',
        ),
        '#88ccee',
        type='AdaptFormer',
        in_a_line='FFN(x) + 0.1·up(gelu(down(x)))',
    ),
    'lorand': CatalogueEntry(
        'LoRand',
        'mona_mm/methods/lorand.py',
        Paper(
            '1% VS 100%: Parameter-Efficient Low Rank Adapter for Dense Predictions',
            'https://openaccess.thecvf.com/content/CVPR2023/html/'
            'Yin_1_VS_100_Parameter-Efficient_Low_Rank_Adapter_for_Dense_Predictions_CVPR_2023_paper.html',
        ),
        '#aa4499',
        type='LoRand',
        in_a_line='an adapter whose matrices are sums of low-rank products',
    ),
    'mona': CatalogueEntry(
        'Mona',
        'mona_mm/methods/mona.py',
        _MONA_PAPER,
        '#cc3311',
        type='Mona',
        in_a_line='x + up(gelu(conv(down(LN(x)·γ + x·γₓ)))), conv = mean of 3x3, 5x5, 7x7 depthwise, then 1x1, each '
        'with its residual',
    ),
    'colin': CatalogueEntry(
        'CoLin',
        'mona_mm/methods/colin.py',
        Paper(
            '1% > 100%: High-Efficiency Visual Adapter with Complex Linear Projection Optimization',
            'https://arxiv.org/abs/2602.10513',
        ),
        '#ee3377',
        type='CoLin',
        in_a_line='x + up(gelu(a·dw3x3(p) + (1 - a)·p)), p = down(x), of low-rank matrices that a term in the loss '
        'keeps close to orthogonal',
    ),
    'adapter_plus': CatalogueEntry(
        'Adapter+',
        'mona_mm/methods/adapter_plus.py',
        Paper('Adapters Strike Back', 'https://arxiv.org/abs/2406.06820'),
        '#0077bb',
        type='AdapterPlus',
        in_a_line='x + s·up(gelu(down(x))), s a learned scale of every channel',
    ),
    'parax': CatalogueEntry(
        'ParaX',
        'mona_mm/methods/parax.py',
        Paper(
            'Parameters as Experts: Adapting Vision Models with Dynamic Parameter Routing',
            'https://arxiv.org/abs/2602.06862',
        ),
        '#882255',
        type='ParaX',
        in_a_line='an adapter with filters whose weights are mixed for every image, from a pool that a stage shares',
        rule='output_norms',
    ),
    'rein': CatalogueEntry(
        'Rein',
        'mona_mm/methods/rein.py',
        Paper(
            'Stronger, Fewer, & Superior: Harnessing Vision Foundation Models for Domain Generalized Semantic '
            'Segmentation',
            'https://arxiv.org/abs/2312.04265',
        ),
        '#cc6677',
        type='Rein',
        in_a_line='f + s·((softmax(f·Tᵀ/√C)·T·Wₜ + f)·W), T = A·B tokens of each block, Wₜ and W of all blocks',
    ),
    'dora': CatalogueEntry(
        'DoRA',
        'mona_mm/methods/dora.py',
        Paper('DoRA: Weight-Decomposed Low-Rank Adaptation', 'https://arxiv.org/abs/2402.09353'),
        '#117733',
        type='DoRA',
        in_a_line='W′x, W′ = m·(W + (α/r)·BA) / ‖W + (α/r)·BA‖ for each row',
        published=False,
    ),
    'spt_lora': CatalogueEntry('SPT-LoRA', _SPT, _SPT_PAPER, '#99cc77', **_OF_SPT),
    'spt_adapter': CatalogueEntry('SPT-Adapter', _SPT, _SPT_PAPER, '#7799cc', **_OF_SPT),
    'spt_mona': CatalogueEntry('SPT-Mona', _SPT, _SPT_PAPER, '#ee8866', **_OF_SPT),
}
"""The methods, by the name that their folder of configs has, in the order of the tables."""

_VARIANTS = dict(spt='#999933', pissa='#66aa55', milora='#aacc88')
_OTHERS = ('#667788', '#bb5566', '#55aa99', '#996699', '#aa8844', '#5566bb')


def method_colour(name: str, number: int = 0) -> str:
    """The colour of a method; one of six others, by its number in a picture, for methods without a colour."""
    if name in CATALOGUE:
        return CATALOGUE[name].colour
    return _VARIANTS.get(name, _OTHERS[number % len(_OTHERS)])


def method_name(cls: str) -> str:
    """The name in tables and of the folder of configs for a method, by the name of its class: ``'adapter_plus'`` for
    ``'AdapterPlus'``."""
    return next((name for name, entry in CATALOGUE.items() if entry.type == cls != 'SPT'), cls.lower())
