"""Launch every kernel by its own operation, and compare within the tests' own error budget.

Oracles are those of tests/support: the closed form in float64, and plain PyTorch in the tensors'
dtype. Each check runs twice: the first launch of a layout goes Triton's way, later ones run the
kernel that it kept. A rotation's first position, which each call gives, and the strides of a merge,
which are in bytes, are small once and large once: past 32 bits. The profiler tells each check's
launches: a kernel that its check did not launch fails the step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from support import attention_oracle as oracle
from support import decode_oracle, operations
from support.score_examples import EXAMPLES
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from extrope_kernels.ops._torch import layouts
from extrope_kernels.testing import assert_within_budget, available_backends

from .results import Deadline, Verdict

DTYPES = (torch.bfloat16, torch.float32)
SIZES = {"seqlen_q": 200, "heads_q": 6, "heads_k": 2, "head_dim": 64}
LENGTHS = (700, 150)  # of the cached sequences
SCORES = ("rerope", "dual_chunk")  # two and three regions; the suite has the others
CACHED = ("plain", "rerope", "leaky_rerope")
# Compared with the reference. That of attention multiplies in float32, while kernels round to 16
# bits: it is no measure. Of the append the cache is compared, not the attention after it.
APPEND = "rerope, append and decode"
BY_REFERENCE = ("rope", "rope of one tensor", "rope after a norm", "append", "merge", APPEND)
# Options of an operation: numbers of its launch, small ones first.
OF_DIM = operations.FREQS[operations.LARGE.dim]
SLOW = replace(OF_DIM, inv_freq=OF_DIM.inv_freq * 2.0**-24)
PLACES = ({"positions": 90}, {"positions": 2**33 + 1, "freqs": SLOW})
NUMBERS: dict[str, tuple[dict[str, Any], ...]] = {
    "rope": PLACES,
    "rope of one tensor": PLACES,
    "rope after a norm": PLACES,
    "merge": ({}, {"apart": 2**31 + 64}),
}
# The kernels that a check must launch, by its operation and backend.
KERNELS: dict[tuple[str, str], tuple[str, ...]] = {
    ("rope", "triton"): ("rotate_kernel",),
    ("rope after a norm", "triton"): ("norm_rotate_kernel", "norm_rotate_backward_kernel"),
    ("append", "triton"): ("rope_append_kernel",),
    ("rerope", "triton"): ("rotate_kernel", "forward_kernel", "dq_kernel", "dkv_kernel"),
    ("rerope with a cache", "triton"): ("decode_kernel",),
    ("merge", "triton"): ("merge_kernel",),
    ("rope", "cuda"): ("rope_kernel",),
}
Check = Callable[[], None]


# -------------------------------------------------------------------------------------------------
# Checks


def checks() -> Iterator[tuple[str, str, Check]]:
    """Yield (operation, backend, check); a check raises if results are wrong or missing."""
    here = {backend for _, backend in operations.everywhere()} - {"reference"}
    attention = [backend for backend in operations.DECODE if backend in here]
    for dtype in DTYPES:
        for name in BY_REFERENCE:
            for backend in filter(here.__contains__, operations.OPERATIONS[name].backends):
                yield name, backend, partial(check_by_reference, name, backend, dtype)
        for backend in attention:
            for score in SCORES:
                yield score, backend, partial(check_attention, score, backend, dtype)
            for score in CACHED:
                for tokens in (1, 5):
                    check = partial(check_decode, score, backend, dtype, tokens, 64)
                    yield f"{score} with a cache", backend, check


def check_by_reference(name: str, backend: str, dtype: torch.dtype) -> None:
    """Compare with the reference in the same dtype, and in float64."""
    operation = replace(operations.OPERATIONS[name], sizes=operations.LARGE)
    inputs = operation.tensors(0, dtype)

    def run(by: str, numbers: dict[str, Any], to: torch.dtype = dtype) -> list[Tensor]:
        copies = {key: x.clone() for key, x in inputs.items()}  # it may write into them
        copies |= {key: inputs[key].to(to, copy=True) for key in operation.shapes}
        return operation(by, **(copies | numbers))[-2 if name == APPEND else 0 :]

    for numbers in NUMBERS.get(name, ({},)):
        found, low = run(backend, numbers), run("reference", numbers)
        exact = run("reference", numbers, torch.float64)
        noises = (
            noise_of_norm(exact, inputs["q"]) if "q_norm_weight" in inputs else [0.0] * len(exact)
        )
        for index, (*results, noise) in enumerate(zip(found, low, exact, noises, strict=True)):
            assert_within_budget(f"result {index}", *results, noise=noise)


def noise_of_norm(exact: list[Tensor], q: Tensor) -> list[float]:
    """Return the roundings that a norm adds to the rotation's.

    They are its mean, products and differences; in the gradient of a weight (1-D) also each
    addition of a running sum, at most as large as the whole.
    """
    terms = [q.numel() / x.numel() if x.dim() == 1 else 0 for x in exact]
    half = torch.finfo(torch.float32).eps / 2
    return [half * (10 + n**0.5) * x.abs().max().item() for n, x in zip(terms, exact)]


def check_attention(score: str, backend: str, dtype: torch.dtype, **sizes: int) -> None:
    """Compare output, log-sum-exp and gradients."""
    tensors, example = oracle.make_qkv(**{**SIZES, **sizes}, dtype=dtype), EXAMPLES[score]
    with torch.no_grad():
        oracle.check(backend, example, tensors)
    oracle.check_gradients(backend, example, tensors, with_lse=False)


def check_decode(
    score: str, backend: str, dtype: torch.dtype, tokens: int, head_dim: int, **sizes: int
) -> None:
    """Attend from some tokens over a paged cache."""
    dims = {"head_dim": head_dim, "rotary_dim": head_dim, "page_size": 16, **sizes}
    own = decode_oracle.SCORES[score]
    decode_oracle.check(decode_oracle.Case(LENGTHS, tokens, dtype=dtype, **dims, **own), backend)


def error_of(check: Check) -> str:
    """Return a check's error in a line; "" if all is right."""
    try:
        check()
    except Exception as error:  # a first launch on a card may raise anything
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        return f"{type(error).__name__}: {first[:200]}"
    return ""


def error_both_ways(check: Check) -> str:
    """Return a check's error if Triton finds the kernels, or else if they are those kept."""
    layouts.forget()
    found = error_of(check)
    if not found and (found := error_of(check)):
        found = f"by kept kernels: {found}"
    return found


# -------------------------------------------------------------------------------------------------
# The step


def run(deadline: Deadline) -> Verdict:
    every, errors, ran = list(checks()), [], 0
    seen: dict[tuple[str, str], set[str]] = {}
    for name, backend, check in every:
        if not deadline:
            break
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            error, lost = error_both_ways(check), error_of(torch.cuda.synchronize)
        seen.setdefault((name, backend), set()).update(x.key for x in profiled.key_averages())
        ran += 1
        print(f"{name}, {backend}: {error or 'ok'}", flush=True)
        errors += [f"{name}, {backend}: {error}"] if error else []
        if lost:  # after a bad access every later call in this process fails
            print(f"the CUDA context is lost: {lost}", flush=True)
            break
    return verdict(len(every), ran, errors, never_launched(seen, available_backends()))


def never_launched(seen: dict[tuple[str, str], set[str]], backends: list[str]) -> list[str] | None:
    """Return the kernels that their checks did not launch; None if the profiler saw none at all.

    seen: the profiler's names of launches, by operation and backend.
    """
    if not any("kernel" in launch for launches in seen.values() for launch in launches):
        return None
    missed = []
    for (operation, backend), kernels in KERNELS.items():
        launches = " ".join(seen.get((operation, backend), ()))
        if backend in backends:
            missed += [f"{name} by {operation} ({backend})" for name in kernels
                       if not re.search(rf"\b{name}\b", launches)]  # fmt: skip
    return missed


def verdict(cases: int, ran: int, errors: list[str], missed: list[str] | None) -> Verdict:
    line = f"{ran - len(errors)} of {cases} checks passed, {len(errors)} failed"
    line += f", {cases - ran} not run" if ran < cases else ""
    if missed is None:
        line += "; the profiler saw no kernels, so which were launched is not known"
    else:
        line += f"; never launched: {', '.join(missed) or 'none'}"
    content = {"errors": errors, "never_launched": missed}
    return Verdict(ran == cases > 0 and not errors and not missed, line, content)
