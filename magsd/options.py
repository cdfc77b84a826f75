"""The command-line options of a configuration dataclass: one option a field, the field's own help."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Any

from .config import TrainingConfig


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """One option for every field of :class:`TrainingConfig`; options not given stay out of the result."""
    hints = typing.get_type_hints(TrainingConfig)
    for field in dataclasses.fields(TrainingConfig):
        name, hint, default = "--" + field.name.replace("_", "-"), hints[field.name], field.default
        text = field.metadata["help"].replace("%", "%%")
        common: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        if hint is bool:
            common |= {
                "action": argparse.BooleanOptionalAction,
                "help": f"{text} (default: {_shown(default)})",
            }
            parser.add_argument(name, **common)
            continue
        choices = field.metadata.get("choices") or (
            typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else None
        )
        if default != "":
            text = f"{text} (default: {_shown(default)})"
        if choices:
            common["choices"] = choices
        else:
            common["metavar"] = field.metadata.get("metavar") or _metavar(hint)
        parser.add_argument(name, help=text, **common)


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The configuration options that the user typed, as text: ``config.resolve`` converts and checks them."""
    known = {field.name for field in dataclasses.fields(TrainingConfig)}
    return {name: value for name, value in vars(arguments).items() if name in known}


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{item:.4g}" if isinstance(item, float) else str(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _metavar(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return "A,B"
    return {int: "N", float: "X"}.get(hint, "NAME")
