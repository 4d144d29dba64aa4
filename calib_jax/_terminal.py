"""Text that any terminal takes."""

import codecs
import io
import sys


def printable(text: str) -> str:
    r"""`text` with escapes for what is no printable character: a file name must not steer the terminal.

    Example:
        >>> printable("a\x1b[2Jb")
        'a\\x1b[2Jb'
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def print_in_any_encoding() -> None:
    """Makes `print` replace characters that the terminal's encoding lacks, such as `-` for a minus sign, else `?`.

    An ASCII terminal or pipe (LANG=C, PYTHONIOENCODING=ascii) would raise UnicodeEncodeError at the first ±.
    """
    codecs.register_error("calib_jax.plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # streams of a notebook are not, and can print any character
            stream.reconfigure(errors="calib_jax.plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_PLAIN.get(c) or ascii(c)[1:-1] for c in error.object[error.start : error.end]), error.end


_PLAIN = dict.fromkeys("−–—─", "-") | dict.fromkeys("“”", '"') | dict.fromkeys("‘’", "'")
_PLAIN |= {"±": "+/-", "×": "x", "…": "...", "↑": "^", "↓": "v"}
