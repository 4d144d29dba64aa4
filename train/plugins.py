"""Names on the command line that stand for objects: `focal(gamma=3)`, `my_package.losses:tversky(alpha=0.3)`.

A name without a colon is looked up in a registry of the project. A name `package.module:attribute` is imported, so
that a user's own loss term, network or data set needs no change of the project.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from train.errors import InputError

_KINDS: Mapping[Any, str] = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}
_CALL = re.compile(r"\s*(?P<name>[\w.:-]+)\s*(?:\((?P<arguments>.*)\))?\s*", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """A name with keyword arguments, as the user wrote them.

    Attributes:
        name: of a registered object, or `package.module:attribute`.
        arguments: by name; Python literals.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


def is_external(name: str) -> bool:
    """Whether a name, with or without arguments, says where to import the object from."""
    return ":" in name


def parse_call(text: str) -> Call:
    """Parses `name` or `name(key=value, ...)`. Values are Python literals; other words are strings.

    Raises:
        InputError: if the text is no call with keyword arguments.

    Example:
        >>> parse_call("focal(gamma=3)")
        Call(name='focal', arguments={'gamma': 3})
        >>> parse_call("my_data:cells(folder='scans/2024', mode=fast)").arguments
        {'folder': 'scans/2024', 'mode': 'fast'}
    """
    match = _CALL.fullmatch(text)
    if match is None:
        raise InputError(f"{text!r} is not NAME or NAME(KEY=VALUE, ...): check its parentheses.")
    try:
        call = ast.parse(f"f({match['arguments'] or ''})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise InputError(f"{text!r} has an argument without a name: write NAME(KEY=VALUE, ...).")
        arguments = {
            str(keyword.arg): value.id
            if isinstance(value := keyword.value, ast.Name)
            else ast.literal_eval(value)
            for keyword in call.keywords
        }
    except (SyntaxError, ValueError, AssertionError) as error:
        raise InputError(
            f"{text!r} has arguments that cannot be read: write NAME(KEY=VALUE, ...) with Python literals."
        ) from error
    return Call(match["name"], arguments)


def split_outside_parentheses(text: str, separator: str) -> list[str]:
    """Splits at a character wherever it stands outside of parentheses.

    Example:
        >>> split_outside_parentheses("dice+ace(class_weights=(1, 1e+2))", "+")
        ['dice', 'ace(class_weights=(1, 1e+2))']
    """
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "([{") - (character in ")]}")
        if character == separator and not (depth or quote):
            parts.append("")
        else:
            parts[-1] += character
    return parts


def import_object(path: str) -> Any:
    """The object that `package.module:attribute` names.

    Raises:
        InputError: if the module cannot be imported, or has no such attribute.
    """
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InputError(
            f"{path}: module {module_name!r} cannot be imported ({type(error).__name__}: {error}). Put its "
            "folder on PYTHONPATH."
        ) from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise InputError(f"{path}: module {module_name!r} has no {attribute!r}.") from error


def check_arguments(call: Call, parameters: Mapping[str, inspect.Parameter]) -> None:
    """Checks the arguments of a call.

    Args:
        call: as `parse_call` returns it.
        parameters: the `keyword_parameters` that a user may set.

    Raises:
        InputError: for an argument that is unknown, is missing, or has the wrong type.

    Example:
        >>> def loss(logits, *, gamma: float = 2.0): ...
        >>> check_arguments(parse_call("loss(gamma=three)"), keyword_parameters(loss))
        Traceback (most recent call last):
        train.errors.InputError: loss takes gamma as a number, but gamma is 'three'.
    """
    for name, value in call.arguments.items():
        if name not in parameters:
            known = f"it takes {', '.join(parameters)}" if parameters else "it takes none"
            raise InputError(f"{call.name} has no argument {name!r}: {known}.")
        if expected := _mismatch(value, parameters[name]):
            raise InputError(f"{call.name} takes {name} as {expected}, but {name} is {value!r}.")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in call.arguments:
            raise InputError(f"{call.name} needs the argument {name}: write {call.name}({name}=VALUE).")


def _mismatch(value: Any, parameter: inspect.Parameter) -> str:
    """What a parameter's annotation, or else its default, asks for, if the value is something else."""
    kind = parameter.annotation
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return "" if value in choices else f"one of {', '.join(map(repr, choices))}"
    if kind not in _KINDS:
        kind = type(parameter.default)
        kind = float if kind is int else kind  # a default such as alpha=1 may stand for any number
    fits = type(value) is kind or (kind is float and type(value) is int)
    return "" if fits else _KINDS.get(kind, "")


def keyword_parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of `function` that are keyword-only or have a default, by name."""
    parameters = inspect.signature(function).parameters
    return {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
        or (parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is not parameter.empty)
    }
