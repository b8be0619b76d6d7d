"""Rows by a condition on their columns: a small part of Python's syntax, read into Arrow expressions."""

from __future__ import annotations

import ast
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_iau.cli.condition import parse_condition, refused, shortened
from hf_iau.errors import RequestError

_MAX_DEPTH = 50
_ROW = "__row_number__"
_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Eq: "__eq__",
    ast.NotEq: "__ne__",
    ast.Lt: "__lt__",
    ast.LtE: "__le__",
    ast.Gt: "__gt__",
    ast.GtE: "__ge__",
}


def rows_where(rows: datasets.Dataset, condition: str) -> np.ndarray:
    """Numbers of the rows that meet a condition such as `label == 3 and source in ["web", "mail"]`: int64, ascending.

    Only column names, literals, comparisons, `in`, `is None`, `and`, `or` and `not` are read; the text is never
    evaluated. A column of classes is compared with a class's number or its name. A missing value meets no comparison.

    Args:
        rows: the rows to choose from.
        condition: the text.

    Raises:
        RequestError: anything else in the text, unknown columns, or values that cannot be compared.
    """
    reader = _Reader(rows)
    expression = reader.condition(parse_condition(condition), 0)
    if not reader.columns:
        raise RequestError(f"The condition {shortened(condition)} names no column: the rows have {_columns(rows)}.")
    table = rows.select_columns(sorted(reader.columns)).with_format("arrow")[:]
    table = table.append_column(_ROW, pa.array(np.arange(len(rows)), pa.int64()))
    try:
        chosen = table.filter(expression)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"The condition {shortened(condition)} does not fit the columns ({error}).") from error
    return np.asarray(chosen[_ROW].to_numpy(), dtype=np.int64)


class _Reader:
    """Turns syntax into Arrow expressions, and notes the columns that they read."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self.features = rows.features
        self.columns: set[str] = set()

    def condition(self, node: ast.expr, depth: int) -> pc.Expression:
        if depth > _MAX_DEPTH:
            raise RequestError(f"The condition is nested more than {_MAX_DEPTH} deep.")
        if isinstance(node, ast.BoolOp):
            parts = [self.condition(value, depth + 1) for value in node.values]
            whole = parts[0]
            for part in parts[1:]:
                whole = whole & part if isinstance(node.op, ast.And) else whole | part
            return whole
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self.condition(node.operand, depth + 1)
        if isinstance(node, ast.Compare):
            whole, left = None, node.left
            for operator, right in zip(node.ops, node.comparators, strict=True):
                part = self.comparison(left, operator, right)
                whole, left = part if whole is None else whole & part, right
            assert whole is not None
            return whole
        if isinstance(node, ast.Name) and self.features.get(node.id) == datasets.Value("bool"):
            return pc.field(self.column(node))
        raise refused(node)

    def comparison(self, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> pc.Expression:
        names = [node for node in (left, right) if isinstance(node, ast.Name)]
        feature = self.features.get(names[0].id) if names else None
        if isinstance(operator, (ast.Is, ast.IsNot)):
            if not isinstance(left, ast.Name) or not (isinstance(right, ast.Constant) and right.value is None):
                raise refused(right)
            missing = pc.field(self.column(left)).is_null()
            return missing if isinstance(operator, ast.Is) else ~missing
        if isinstance(operator, (ast.In, ast.NotIn)):
            if not isinstance(left, ast.Name) or not isinstance(right, (ast.List, ast.Tuple, ast.Set)):
                raise refused(right)
            values = [self.literal(element, feature) for element in right.elts]
            if not values:
                raise RequestError(f"The list of values for {left.id!r} is empty: no row is in it.")
            column = pc.field(self.column(left))
            try:
                within = column.isin(pa.array(values))
            except (pa.ArrowException, TypeError, OverflowError) as error:
                raise RequestError(f"The values for {left.id!r} are of different kinds ({error}).") from error
            return within if isinstance(operator, ast.In) else column.is_valid() & ~within
        method = _COMPARISONS.get(type(operator))
        if method is None or not names:
            raise refused(left)
        return getattr(self.value(left, feature), method)(self.value(right, feature))

    def value(self, node: ast.expr, feature: Any) -> pc.Expression:
        if isinstance(node, ast.Name):
            return pc.field(self.column(node))
        value = self.literal(node, feature)
        try:
            return pc.scalar(value)
        except (pa.ArrowException, OverflowError) as error:
            raise RequestError(f"The value {value!r} in the condition cannot be used ({error}).") from error

    def column(self, node: ast.Name) -> str:
        if node.id not in self.features:
            raise RequestError(f"The condition names a column {node.id!r}: the rows have {', '.join(self.features)}.")
        self.columns.add(node.id)
        return node.id

    def literal(self, node: ast.expr, feature: Any) -> Any:
        sign = 1
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            node, sign = node.operand, -1
            if not isinstance(node, ast.Constant) or isinstance(node.value, (bool, str)):
                raise refused(node)
        if not isinstance(node, ast.Constant) or not isinstance(node.value, (bool, int, float, str)):
            raise refused(node)
        value = node.value
        if isinstance(feature, datasets.ClassLabel) and isinstance(value, str):
            if value not in feature.names:
                raise RequestError(f"There is no class {value!r}: the column has {', '.join(feature.names[:20])}.")
            return feature.str2int(value)
        return sign * value if sign < 0 else value


def _columns(rows: datasets.Dataset) -> str:
    return ", ".join(rows.column_names)
