"""The bases of records and settings: records are stored as JSON and read back, with no extra fields and no changes."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Frozen(BaseModel):
    """An immutable record that allows no fields but those declared."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StrictBools(BaseModel):
    """Settings that take true and false only where something is on or off, never as the numbers 1 and 0."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: object, info: ValidationInfo) -> object:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("true and false are only for settings that are on or off, and this one is not")
        return value


class Printed:
    """Mixin: as the last value of a notebook's cell, it is shown as `print` shows it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # IPython takes the first class in the MRO that defines this or `__repr__` itself, and bases or decorators may.
        super().__init_subclass__(**kwargs)
        cls._repr_pretty_ = Printed._repr_pretty_  # type: ignore[method-assign]

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))
