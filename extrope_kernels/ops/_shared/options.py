"""The keyword arguments that every attention function has, named once.

`rerope_attention` and `rerope_attention_with_kvcache` document them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

Parameters = ParamSpec("Parameters")


class SoftmaxOptions(TypedDict, total=False):
    """What functions with and without a cache take alike."""

    softmax_scale: float | None
    log_n: float | None
    query_scale: Tensor | None
    softcap: float
    sinks: Tensor | None
    sliding_window: int | None
    interleaved: bool
    return_lse: bool
    backend: str | None


class AttentionOptions(SoftmaxOptions, total=False):
    """What the functions without a cache take."""

    q_start: Tensor | int | None
    k_start: Tensor | int | None
    cu_seqlens: Tensor | None


class CacheOptions(SoftmaxOptions, total=False):
    """What the functions over a cache take, beside cache_seqlens."""

    k: Tensor | None
    v: Tensor | None
    block_table: Tensor | None
    cache_leftpad: Tensor | None
    cu_seqlens_q: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None


def tensor_or_pair(
    function: Callable[Parameters, Tensor | tuple[Tensor, Tensor]],
) -> Callable[Parameters, Tensor | Any]:
    """To type checkers the result is a Tensor that may be unpacked, as of `takes_options_of`."""
    return function


def takes_options_of(
    attend: Callable, internal: tuple[str, ...]
) -> Callable[
    [Callable[Parameters, Tensor | tuple[Tensor, Tensor]]], Callable[Parameters, Tensor | Any]
]:
    """Show the keyword arguments of `attend`, but for the internal ones, as the function's own.

    To type checkers the result is a Tensor that may be unpacked too: only two overloads of every
    function, with all of its parameters, could tell by return_lse which of the two it is.
    """

    def show(
        function: Callable[Parameters, Tensor | tuple[Tensor, Tensor]],
    ) -> Callable[Parameters, Tensor | Any]:
        shown = inspect.signature(function)
        own = {n: p for n, p in shown.parameters.items() if p.kind is not p.VAR_KEYWORD}
        options = {
            name: parameter
            for name, parameter in inspect.signature(attend).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and name not in (*own, *internal)
        }
        function.__signature__ = shown.replace(parameters=[*own.values(), *options.values()])  # type: ignore[attr-defined]
        return function

    return show


def refuse_unknown(op: str, unknown: dict) -> None:
    """Raise TypeError for the first argument that a function does not have."""
    if unknown:
        raise TypeError(f"{op}: got an unexpected keyword argument {next(iter(unknown))!r}")
