"""Every argument of every public function, given everything that it must not be, on all backends.

A call with one wrong argument raises TypeError, ValueError or NotImplementedError that names the
function and the argument and says what came, and writes to none of the tensors that it was given.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from itertools import product

import pytest
import torch
from support.right_calls import CALLS, DEVICE
from support.wrong_values import WRONG, of_the_kind

import extrope_kernels
from extrope_kernels import RopeFreqs, positions
from extrope_kernels.methods import METHODS, WRAPPERS
from extrope_kernels.scores import SCORES
from extrope_kernels.testing import available_backends

# Of two arguments that do not fit together, either may be named.
MISMATCHES = ("meta", "half", "double", "batch", "batch 3", "no sequences", "head_dim", "no dims")
REFUSALS = (TypeError, ValueError, NotImplementedError)
# What calls of a kind take, by a word of their names.
RIGHT = {
    "packed": {"no batch", "boundaries"},
    "axes": {"by axes"},
    "fp8": {"float8", "scale"},
}
# What the reference takes, and fakes: gradients of decays, values of any size.
OF_THE_REFERENCE = {("decay", "learned"), ("v", "no dims")}
# What tensors without values do not show, as in a graph; layouts are not kept on the way there.
NOT_ON_META = (
    *("values", "meta", "sparse", "nested", "strided", "expanded", "the other", "elsewhere"),
)


def function(name: str):
    found = extrope_kernels
    for part in name.split()[0].split("."):
        found = getattr(found, part)
    return found


def op(name: str) -> str:
    """What messages call the function: attention by its score."""
    score = CALLS[name].get("score")
    if name.startswith("rope_attention") and score is not None:
        return score.name
    name = name.split()[0]
    for start in ("apply_rope", "permute_qk"):
        if name.startswith(start):
            return start.removeprefix("apply_").removesuffix("_qk")
    for start in ("methods.", "scores.", "query_scale."):
        name = name.removeprefix(start)
    return name


def arguments() -> list[tuple[str, str]]:
    return [(name, argument) for name in CALLS for argument in parameters(name)]


def parameters(name: str) -> list[str]:
    return list(inspect.signature(function(name)).parameters)


def wrong(name: str, argument: str) -> dict:
    called = name.split()[0]
    ending = "with_kvcache" if called.endswith("with_kvcache") else ""
    names = (f"{called}.{argument}", f"{ending}.{argument}", argument)
    found = next((WRONG[key] for key in names if key in WRONG), None)
    if found is None:
        default = inspect.signature(function(name)).parameters[argument].default
        found = of_the_kind(CALLS[name].get(argument, default))
    right = {what for word, several in RIGHT.items() if word in name for what in several}
    if argument == "v" and not ending:
        right.add("head_dim")  # its own
    if "fp8" not in name:
        right.add("no scale")
    if DEVICE == "cuda":
        right |= {what for what in found if what.startswith("values")}
    return {what: value for what, value in found.items() if what not in right}


def backends(name: str, argument: str) -> list[str | None]:
    """None and, of those that can run here, the reference and Triton; fakes, on meta tensors."""
    if argument == "backend" or "backend" not in parameters(name):
        return [None]
    known = {"reference", *(available_backends() if "rope" in name else ())}
    return [None, *sorted(known & {"reference", "triton"}), "meta"]


def on_meta(value):
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, RopeFreqs):
        return replace(value, **{name: on_meta(x) for name, x in vars(value).items()})
    return value


def leaves(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list):
        return [x for item in value for x in leaves(item)]
    return leaves([value.inv_freq]) if isinstance(value, RopeFreqs) else []


def test_every_public_function_is_here():
    late = {"check", "extend", "restore"}  # of models
    public = {n for n in extrope_kernels.__all__ if inspect.isfunction(function(n))} - late
    public |= {f"methods.{n}" for n in METHODS | WRAPPERS}
    public |= {f"positions.{n}" for n in positions.__all__} | {f"scores.{n}" for n in SCORES}
    assert public <= {name.split()[0] for name in CALLS}


@pytest.mark.parametrize("name", CALLS)
def test_the_call_itself_is_right(name):
    given = {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in CALLS[name].items()}
    function(name)(**given)


@pytest.mark.parametrize(("name", "argument"), arguments())
def test_is_refused_by_name(name, argument):
    failures = []
    values = wrong(name, argument).items()
    for backend, (what, value) in product(backends(name, argument), values):
        given = {**CALLS[name], argument: value}
        if backend == "meta":
            if any(x in what for x in NOT_ON_META) or (argument, what) in OF_THE_REFERENCE:
                continue
            given = {key: on_meta(x) for key, x in given.items()}
        elif backend is not None:
            given["backend"] = backend
            if backend == "reference" and (argument, what) in OF_THE_REFERENCE:
                continue
        what = what if backend is None else f"{what}, {backend}"
        tensors = leaves(list(given.values()))
        before = [x.clone() for x in tensors]
        try:
            function(name)(**given)
        except REFUSALS as error:
            message = str(error)
            spoken = {"x": r"q|k"}.get(argument, argument)
            if what.split(",")[0] in MISMATCHES:
                spoken = "|".join(("inv_freq", "head_dim", *parameters(name)))
            if argument == "freqs" and isinstance(value, RopeFreqs):
                spoken = rf"freqs|{what.split()[0]}"
                if "axes" in name:  # those of one axis do not go with its positions
                    spoken += "|positions"
            called = name.split()[0] if argument == "score" else op(name)
            told = message.startswith(called) and re.search(r"\b(got|does not$)", message)
            if not told or not re.search(rf"\b({spoken})\b", message):
                failures.append(f"{what}: {type(error).__name__}: {message[:150]}")
        except Exception as error:
            failures.append(f"{what}: {type(error).__name__}: {str(error)[:150]}")
        else:
            failures.append(f"{what}: accepted")
        for x, old in zip(tensors, before):
            dense = not x.is_sparse and not x.is_nested
            if x.device.type != "meta" and dense and not same_bits(x, old):
                failures.append(f"{what}: a tensor was written to")
    assert not failures, "\n".join(failures)


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    x, y = (each.detach().flatten().clone().view(torch.uint8) for each in (x, y))
    return torch.equal(x, y)
