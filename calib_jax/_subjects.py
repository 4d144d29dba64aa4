"""Which cases are of one subject, from their names."""

import re
from collections.abc import Sequence


def find_subjects(pattern: str, case_names: Sequence[str]) -> dict[str, str]:
    """Subject of each case by the case's name: the first match of a regular expression.

    Raises:
        ValueError: if `pattern` is no regular expression, finds nothing in a name, or finds one subject only.

    Example:
        >>> find_subjects("p[0-9]", ["p1_a", "p1_b", "p2_a"])
        {'p1_a': 'p1', 'p1_b': 'p1', 'p2_a': 'p2'}
    """
    try:
        matches = {name: re.search(pattern, name) for name in case_names}
    except re.error as error:
        raise ValueError(f"--subjects {pattern!r} is no regular expression: {error}.") from error
    found = {name: match[0] for name, match in matches.items() if match and match[0]}
    if nameless := [name for name in case_names if name not in found]:
        raise ValueError(
            f"--subjects {pattern!r} finds no subject in the name of the case {nameless[0]!r}: give an expression "
            "that fits every name."
        )
    if len(alike := set(found.values())) == 1 < len(found):
        raise ValueError(
            f"--subjects {pattern!r} finds {alike.pop()!r} in the names of all {len(found)} cases: give an "
            "expression that tells subjects apart."
        )
    return found
