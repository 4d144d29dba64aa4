"""Names on the command line that stand for objects: `focal(gamma=3)`, `my_package.losses:tversky(alpha=0.3)`.

A name without a colon is looked up in a registry of the project. A name `package.module:attribute` is imported, so
that a user's own loss term, network or data set needs no change of the project.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from train.errors import InputError

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

    @property
    def is_external(self) -> bool:
        """Whether the name says where to import the object from."""
        return ":" in self.name


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
    if match["arguments"] is None:
        return Call(match["name"])
    try:
        call = ast.parse(f"f({match['arguments']})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise InputError(f"{text!r} has an argument without a name: write NAME(KEY=VALUE, ...).")
        arguments = {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise InputError(
            f"{text!r} has arguments that cannot be read: write NAME(KEY=VALUE, ...) with Python literals."
        ) from error
    return Call(match["name"], arguments)


def _literal(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


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


def check_arguments(call: Call, accepted: Iterable[str]) -> None:
    """Raises `InputError` for an argument that is not among the `accepted` names."""
    accepted = tuple(accepted)
    for name in call.arguments:
        if name not in accepted:
            known = f"it takes {', '.join(accepted)}" if accepted else "it takes none"
            raise InputError(f"{call.name} has no argument {name!r}: {known}.")


def keyword_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the keyword-only arguments of `function`."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)
