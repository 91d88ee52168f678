"""The colours of the methods in all pictures."""

METHOD_COLOURS = dict(
    full='#000000',
    mona='#cc3311',
    adapter='#4477aa',
    adaptformer='#88ccee',
    lora='#228833',
    lorand='#aa4499',
    spt='#999933',
    spt_lora='#99cc77',
    spt_adapter='#7799cc',
    spt_mona='#ee8866',
    fixed='#ddaa33',
    bitfit='#332288',
    norm_tuning='#44bbaa',
    partial_1='#885533',
    colin='#ee3377',
    adapter_plus='#0077bb',
    dora='#117733',
    pissa='#66aa55',
    milora='#aacc88',
    parax='#882255',
    rein='#cc6677',
)
"""The colour of each method, by its name in tables."""

_OTHERS = ('#667788', '#bb5566', '#55aa99', '#996699', '#aa8844', '#5566bb')


def method_colour(name: str, number: int = 0) -> str:
    """The colour of a method; one of six others, by its number in a picture, for methods without a colour."""
    return METHOD_COLOURS.get(name, _OTHERS[number % len(_OTHERS)])
