"""Settings checked by pydantic, and its errors in our own words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar, get_args

from jepakit._messages import did_you_mean
from jepakit.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic_core import ErrorDetails

_Model = TypeVar("_Model", bound="BaseModel")

_PLAIN = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "input should be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "input should be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "input should be true or false"),
    **dict.fromkeys(("tuple_type", "missing", "too_long"), "input should be a list like the default"),
    **dict.fromkeys(("dict_type", "model_type"), "input should be a group of settings, each set by its own name"),
}
"""Our words for pydantic's errors whose own words assume that one knows its types."""


def parse(model: type[_Model], values: dict[str, object], origins: Mapping[str, str] | None = None) -> _Model:
    """`model(**values)`, with pydantic's ValidationError turned into one clear ConfigError.

    `origins` says by name where values come from that the caller does not see, such as a file.
    """
    from pydantic import ValidationError

    try:
        return model(**values)
    except ValidationError as error:
        raise ConfigError(explain(error, model, origins or {})) from None


def explain(error: ValidationError, model: type[BaseModel], origins: Mapping[str, str]) -> str:
    """Every error of a pydantic ValidationError on one line: the setting, its value, what is expected, where it is set.

    A setting of several possible types is reported once, with what each of them expects.
    """
    complaints: dict[str, list[tuple[str, str]]] = {}
    for detail in error.errors():
        where = _setting(detail["loc"], model)
        words = _words(where, detail, model)
        if words not in complaints.setdefault(where, []):
            complaints[where].append(words)
    told = {where: _join(words) for where, words in complaints.items()}
    return "; ".join(message + _set_in(where, message, origins) for where, message in told.items())


def _set_in(where: str, message: str, origins: Mapping[str, str]) -> str:
    """A note on where the setting is set; for an error about several settings, where each that its message names is set."""
    if where:
        return f" (set in {origins[where]})" if where in origins else ""
    named = [
        f"{name} is set in {origin}"
        for name, origin in origins.items()
        if re.search(rf"\b{name.replace('_', '[_ ]')}\b", message, re.IGNORECASE)
    ]
    return f" ({', '.join(named)})" if named else ""


def _setting(loc: Sequence[int | str], model: type[BaseModel]) -> str:
    """The dotted name of the setting: fields of `model` and of groups within it, without pydantic's type tags."""
    names: list[str] = []
    group: type[BaseModel] | None = model
    for part in loc:
        if group is None:
            break
        names.append(str(part))
        group = _group(group, str(part))
    return ".".join(names)


def _group(model: type[BaseModel], field: str) -> type[BaseModel] | None:
    """The group that a field of `model` holds, optional ones included; None for any other field."""
    from pydantic import BaseModel

    annotation = model.model_fields[field].annotation if field in model.model_fields else None
    kinds = get_args(annotation) or (annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _elsewhere(name: str, parents: list[str], root: type[BaseModel]) -> str:
    """A hint at where a setting belongs that was given in the wrong group, or outside its own; empty if there is none."""
    if parents and name in root.model_fields:
        return (
            f": {name} is no part of {'.'.join(parents)}; in a TOML file, write it above the line [{'.'.join(parents)}]"
        )
    groups = [group for group in root.model_fields if (inner := _group(root, group)) and name in inner.model_fields]
    return f"; did you mean {groups[0]}.{name}?" if groups and not parents else ""


def _words(where: str, detail: ErrorDetails, model: type[BaseModel]) -> tuple[str, str]:
    """The setting and its value, if there is one, and what is wrong or expected."""
    if detail["type"] == "extra_forbidden":
        *parents, last = where.split(".")
        root = model
        for parent in parents:
            model = _group(model, parent) or model
        within = "".join(f"{parent}." for parent in parents)
        hint = _elsewhere(last, parents, root) or did_you_mean(last, model.model_fields, within=within)
        return "", f"unknown setting {where!r}{hint}"
    if detail["type"] == "missing" and not isinstance(detail["loc"][-1], int):
        return "", f"setting {where!r} is missing"
    message = _PLAIN.get(detail["type"], detail["msg"]).removeprefix("Value error, ")
    if not where:
        return "", message
    if detail["type"] == "literal_error" and isinstance(detail["input"], str):
        message += did_you_mean(detail["input"], re.findall(r"'([^']*)'", message))
    seen = repr(detail["input"])
    return f"{where} = {seen if len(seen) < 80 else seen[:77] + '...'}: ", message[0].lower() + message[1:]


def _join(words: list[tuple[str, str]]) -> str:
    (head, first), *others = words
    return head + " or ".join([first, *(wanted.removeprefix("input should be ") for _, wanted in others)])
