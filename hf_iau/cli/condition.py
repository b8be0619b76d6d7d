"""The text of `--where`, read without being run: a small part of Python's syntax."""

from __future__ import annotations

import ast

from hf_iau.errors import RequestError

HELP = "Write comparisons of columns with numbers or texts, `in` with a list, joined by and, or, not."

_MAX_LENGTH = 100_000
_ALLOWED = (
    *(ast.BoolOp, ast.boolop, ast.UnaryOp, ast.Not, ast.USub, ast.Compare, ast.cmpop),
    *(ast.Name, ast.expr_context, ast.Constant, ast.List, ast.Tuple, ast.Set),
)


def parse_condition(text: str) -> ast.expr:
    """The syntax tree of a condition; nothing in it calls, looks up or computes anything.

    Raises:
        RequestError: it is no expression, or holds anything but columns, values, comparisons and their joins.
    """
    if len(text) > _MAX_LENGTH:
        raise RequestError(f"The condition is {len(text):,} characters long; name rows by an ids file instead.")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise RequestError(f"The condition {shortened(text)} cannot be read ({error}). {HELP}") from error
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED):
            raise refused(node)
    return tree


def refused(node: ast.AST) -> RequestError:
    """The error about a part of a condition that is not allowed."""
    try:
        text = shortened(ast.unparse(node))
    except RecursionError:
        text = "So deep an expression"
    return RequestError(f"{text} is not allowed in a condition. {HELP}")


def shortened(text: str) -> str:
    """`text` in quotes, cut at 80 characters."""
    return repr(text if len(text) <= 80 else text[:77] + "…")
