"""The API pages show what `field(metadata={"help": …})` says of an option, which the source says once."""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe

GROUP = re.compile(r"^(Parameters that control [^\n]*):\n\s+(\S[^\n]*(?:\n\s+\S[^\n]*)*)$", re.MULTILINE)
"""A group of options in a configuration's docstring: its name, and below it, indented, the options."""


class FieldHelp(griffe.Extension):
    """Takes a dataclass field's help text as the docstring of the attribute, and its default as the value."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **_: Any) -> None:
        """Called for each attribute that is read from source."""
        value = getattr(node, "value", None)
        if not (isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field")):
            return
        settings = {keyword.arg: keyword.value for keyword in value.keywords}
        metadata = settings.get("metadata")
        if isinstance(metadata, ast.Dict):
            for key, words in zip(metadata.keys, metadata.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "help" and isinstance(words, ast.Constant):
                    attr.docstring = griffe.Docstring(str(words.value), parent=attr)
        if "default" in settings:
            attr.value = ast.unparse(settings["default"])

    def on_class_instance(self, *, cls: griffe.Class, **_: Any) -> None:
        """Groups of options become lines of their own, for they are no section that the reader knows."""
        if cls.docstring is not None:
            cls.docstring.value = GROUP.sub(_line, cls.docstring.value)


def _line(group: re.Match[str]) -> str:
    options = ", ".join(f"`{name.strip(' .')}`" for name in re.sub(r"\s+", " ", group[2]).split(","))
    return f"*{group[1]}*: {options}.\n"
