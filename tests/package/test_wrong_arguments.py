"""Every argument of every public function, given everything that it must not be.

A call with one wrong argument raises TypeError, ValueError or NotImplementedError that names the
function and the argument, and writes to none of the tensors that it was given.
"""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from right_calls import CALLS
from wrong_values import WRONG, of_the_kind

import extrope_kernels
from extrope_kernels import RopeFreqs, positions
from extrope_kernels.methods import METHODS, WRAPPERS
from extrope_kernels.scores import SCORES

# Of two arguments that do not fit together, either may be named.
MISMATCHES = ("meta", "half", "double", "batch", "batch 3", "no sequences", "head_dim", "no dims")
REFUSALS = (TypeError, ValueError, NotImplementedError)


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
    return name.removeprefix("methods.").removeprefix("scores.")


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
    right = {"no batch"} if "packed" in name else set()
    if argument == "v" and not ending:
        right.add("head_dim")  # its own
    return {what: value for what, value in found.items() if what not in right}


def leaves(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list):
        return [x for item in value for x in leaves(item)]
    return leaves([value.inv_freq]) if isinstance(value, RopeFreqs) else []


def test_every_public_function_is_here():
    public = {n for n in extrope_kernels.__all__ if inspect.isfunction(function(n))}
    public |= {f"methods.{n}" for n in METHODS | WRAPPERS}
    public |= {f"positions.{n}" for n in positions.__all__} | {f"scores.{n}" for n in SCORES}
    assert public <= set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_the_call_itself_is_right(name):
    given = {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in CALLS[name].items()}
    function(name)(**given)


@pytest.mark.parametrize(("name", "argument"), arguments())
def test_is_refused_by_name(name, argument):
    failures = []
    for what, value in wrong(name, argument).items():
        given = {**CALLS[name], argument: value}
        tensors = leaves(list(given.values()))
        before = [x.clone() for x in tensors]
        try:
            function(name)(**given)
        except REFUSALS as error:
            message = str(error)
            spoken = {"x": r"q|k"}.get(argument, argument)
            if what in MISMATCHES:
                spoken = "|".join(("inv_freq", "head_dim", *parameters(name)))
            if argument == "freqs" and isinstance(value, RopeFreqs):
                spoken = rf"freqs|{what.split()[0]}"
            called = name.split()[0] if argument == "score" else op(name)
            if not message.startswith(called) or not re.search(rf"\b({spoken})\b", message):
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
    return torch.equal(x.flatten().clone().view(torch.uint8), y.flatten().clone().view(torch.uint8))
