"""Check the options that a config gives to a function against the annotations of the function's arguments.

An annotation gives the type (``bool``, ``int``, ``float``, ``str``, ``None``, ``Literal``, unions, ``Sequence``,
``Mapping``, a class), and ``Annotated[type, Rule(...)]`` a further condition. Types are strict, since a wrong type in a
config is a mistake: a bool is not accepted as a number, a float not as an int, a string not as a list of strings, and
numbers of numpy or torch not as Python's; floats must be finite. Any other annotation accepts every value.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, wraps
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from mona_mm.errors import ConfigError, UnknownOptionError


@dataclass(frozen=True)
class Rule:
    """A condition on values of the annotated type.

    Args:
        text: the words for it after "must be" in a message; None for the words of the type.
        fits: a function of a value that tells whether the condition holds.
    """

    text: str | None
    fits: Callable[[Any], bool] = lambda value: True


LARGEST = 2**31 - 1
"""The largest whole number for the size of a tensor; larger sizes overflow before any memory is allocated."""

Count = Annotated[int, Rule('a whole number of at least 1', lambda value: 1 <= value <= LARGEST)]
Width = Annotated[Count, Rule(None)]
"""A :data:`Count` that is at most as large as the widest block of the host; see :func:`widths`."""
Probability = Annotated[float, Rule('a probability in [0, 1)', lambda value: 0 <= value < 1)]
Ratio = Annotated[float, Rule('a number of at least 0', lambda value: value >= 0)]
Positive = Annotated[float, Rule('a number above 0', lambda value: value > 0)]


def checked(function: Callable) -> Callable:
    """Decorate a function so that :func:`check_options` checks the arguments of every call.

    Messages name a method by the class of its object, so that a subclass appears under its own name.
    """
    signature = inspect.signature(function)
    is_method = next(iter(signature.parameters), None) == 'self'

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        owner = type(args[0]).__name__ if is_method else function.__name__
        check_options(owner, function, kwargs, given=['self'])
        try:
            arguments = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise ConfigError(f'{owner}: {error}.') from None
        check_options(owner, function, {name: arguments[name] for name in arguments if name in _named(function)})
        return function(*args, **kwargs)

    return call


def check_options(
    owner: str,
    function: Callable,
    options: Mapping[str, Any],
    given: Iterable[str] = (),
    more: Sequence[str] = (),
    by_block: Iterable[str] = (),
) -> None:
    """Check that ``options`` are arguments of ``function``, with values that their annotations allow.

    A value that is the argument's default is always allowed.

    Args:
        owner: the name of the function in messages.
        function: a function or class.
        options: the options by name.
        given: arguments that are not options, since the caller provides them.
        more: further names of options, which are not arguments of the function.
        by_block: the options that may also be a mapping from patterns of blocks to values, each of which is checked.

    Raises:
        UnknownOptionError: if an option is not an argument; the message lists the arguments.
        ConfigError: if a value is not accepted.
    """
    named, hints = _named(function), _hints(function)
    accepted = [name for name in named if name not in given] + list(more)
    takes_any = len(named) < len(inspect.signature(function).parameters)
    for name, value in options.items():
        if name not in accepted and not (takes_any and isinstance(name, str)):
            close = get_close_matches(str(name), accepted, n=1)
            hint = f' Did you mean {close[0]!r}?' if close else ''
            accepts = f'it accepts {", ".join(accepted)}' if accepted else 'it accepts none'
            raise UnknownOptionError(f'{owner} has no argument {show(name)}; {accepts}.{hint}')
        values = {name: value}
        if name in by_block and isinstance(value, Mapping):
            if not value or not all(isinstance(pattern, str) and pattern for pattern in value):
                raise ConfigError(
                    f'{owner}: {name}={show(value)} must have patterns of blocks as its keys, such as '
                    "{'stages.3': 128, 'default': 64}."
                )
            values = {f'{name}[{pattern!r}]': of_block for pattern, of_block in value.items()}
        for label, each in values.items():
            if name in named and each is not named[name].default and not _fits(each, hints.get(name, Any)):
                raise ConfigError(f'{owner}: {label}={show(each)} must be {_describe(hints[name])}.')


def widths(function: Callable) -> list[str]:
    """The arguments of a function that are annotated as a :data:`Width`."""
    return [name for name, hint in _hints(function).items() if hint == Width]


def accepted_values(function: Callable) -> dict[str, str]:
    """The accepted values of a function's arguments, in words, by name. Arguments without annotation are left out."""
    return {name: _describe(hint) for name, hint in _hints(function).items() if name in _named(function)}


def show(value: Any) -> str:
    """Format a value for a message: its shortened ``repr``, or its type if ``repr`` fails."""
    try:
        text = ' '.join(repr(value).split())
    except Exception:  # any class may raise, and so do whole numbers with more digits than Python prints
        text = f'<{type(value).__name__}>'
    return text if len(text) <= 120 else f'{text[:117]}...'


@cache
def _named(function: Callable) -> dict[str, inspect.Parameter]:
    """The parameters of a function that can be passed by name, without ``*args`` and ``**kwargs``."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: p for name, p in inspect.signature(function).parameters.items() if p.kind not in variadic}


@cache
def _hints(function: Callable) -> dict[str, Any]:
    annotated = inspect.unwrap(function.__init__ if inspect.isclass(function) else function)
    try:
        return get_type_hints(annotated, include_extras=True)
    except (NameError, TypeError):  # third-party annotations may use names that only type checkers import
        return {}


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        rules = [extra for extra in hint.__metadata__ if isinstance(extra, Rule)]
        return _fits(value, hint.__origin__) and all(rule.fits(value) for rule in rules)
    if origin in (Union, UnionType):
        return any(_fits(value, alternative) for alternative in arguments)
    if origin is Literal:
        return isinstance(value, str | int | NoneType) and value in arguments
    if hint is bool or hint is str or hint is NoneType or hint is None:
        return isinstance(value, NoneType if hint is None else hint)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
    if origin in (Sequence, list):
        return isinstance(value, list | tuple) and all(_fits(item, arguments[0]) for item in value)
    if origin is tuple and arguments[-1:] == (Ellipsis,):
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if origin in (Mapping, dict):
        return isinstance(value, Mapping) and all(
            _fits(key, arguments[0]) and _fits(item, arguments[1]) for key, item in value.items()
        )
    if hint is Any or not inspect.isclass(hint):
        return True
    try:
        return isinstance(value, hint)
    except TypeError:  # a protocol that cannot be checked at run time
        return True


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _describe(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        texts = [extra.text for extra in hint.__metadata__ if isinstance(extra, Rule) and extra.text]
        return texts[-1] if texts else _describe(hint.__origin__)
    if origin in (Union, UnionType, Literal):
        *others, last = _alternatives(hint)
        return f'{", ".join(others)} or {last}' if others else last
    if origin in (Sequence, list, tuple):
        return f'a list whose entries are each {_describe(arguments[0])}'
    if origin in (Mapping, dict):
        return 'a dict with names as keys' if arguments[0] is str else 'a dict'
    names = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'a string', NoneType: 'None'}
    return names.get(hint, f'a {getattr(hint, "__name__", hint)}')


def _alternatives(hint: Any) -> list[str]:
    if get_origin(hint) in (Union, UnionType):
        return [text for alternative in get_args(hint) for text in _alternatives(alternative)]
    return [repr(value) for value in get_args(hint)] if get_origin(hint) is Literal else [_describe(hint)]
