"""The fields of a call's class, read from its annotations: what its ops take, and what is checked.

The class is the one declaration of a call. An annotation gives a field's type, and by Annotated
what a tensor must be (`Spec`), what a number must be (a check), and whether it has a gradient:

    bias: Annotated[Tensor | None, Spec("bias", "heads_q", (WIDE,)), GRAD] = None
    cap: Annotated[float, Range(1e-30, 1e30, or_zero=True)] = 0.0
"""

from __future__ import annotations

from types import NoneType
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from torch import Tensor

from .checks import check_int, check_real, refuse_flags
from .specs import Spec

GRAD = "grad"  # the op has a gradient for it


class Range(NamedTuple):
    """A check of a number: from `least` on, above 0 if that is 0, up to `most`."""

    least: float
    most: float
    or_zero: bool = False  # 0 is taken too, for none

    def __call__(self, op: str, name: str, value: float) -> None:
        above = value >= self.least if self.least else value > 0
        if (above and value <= self.most) or (self.or_zero and value == 0):
            return
        least, most = (f"{x:g}".replace("e+", "e") for x in (self.least, self.most))
        wanted = f"from {least} to {most}" if self.least else f"> 0 and at most {most}"
        wanted = f"0 (none) or {wanted}" if self.or_zero else wanted
        raise ValueError(f"{op}: {name} must be {wanted}, got {value}")


class Field(NamedTuple):
    """One field of a call."""

    name: str
    kind: type  # Tensor, float, int or bool; any other is no argument of an op
    optional: bool  # None is taken
    default: Any
    notes: tuple[Any, ...]

    @property
    def argument(self) -> str:
        """The field as an argument of an op's schema.

        Tensors have no default: Autograd kernels see all of them. An int's is None, and means the
        field's: AOTInductor cannot leave out an int.
        """
        optional = self.optional or self.kind is int
        kind = f"{self.kind.__name__}{'?' * optional} {self.name}"
        if self.kind is Tensor:
            return kind
        return f"{kind}={None if optional else self.default}"

    @property
    def spec(self) -> Spec:
        """What the tensor must be."""
        return next(x for x in self.notes if isinstance(x, Spec))._replace(optional=self.optional)


def fields_of(call: type) -> tuple[Field, ...]:
    """Read the fields of a NamedTuple's class."""
    found = []
    for name, hint in get_type_hints(call, include_extras=True).items():
        hint, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        kinds = get_args(hint) or (hint,)
        kind = next(x for x in kinds if x is not NoneType)
        default = call._field_defaults.get(name)
        found.append(Field(name, kind, NoneType in kinds, default, tuple(notes)))
    return tuple(found)


def check_number(op: str, field: Field, value: Any) -> None:
    """Refuse what is no number of the field's kind, or not in its range."""
    if value is None and field.optional:
        return
    if field.kind is bool:
        refuse_flags(op, **{field.name: value})
    elif field.kind is int:
        check_int(op, field.name, value)
    else:
        check_real(op, field.name, value)
    for check in field.notes:
        check(op, field.name, value)
