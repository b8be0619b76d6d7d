"""The API pages show what `field(metadata={"help": …})` says of an option, which the source says once."""

from __future__ import annotations

import ast
from typing import Any

import griffe


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
