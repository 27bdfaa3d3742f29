"""Every op that a public function runs, as PyTorch sees it: schema, fakes, gradients, graphs."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from support.operations import OPERATIONS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from extrope_kernels import _ext
from extrope_kernels.testing import device

# An op in every form that its schema has, each by few cases: a check takes a second.
CHECKED = {
    name: OPERATIONS[name]
    for name in (
        *("rope by head, with decay", "rope by axes", "rope of learned frequencies"),
        *("rope, packed", "rope, in place", "rope after a norm", "append by slots"),
        *("append, packed", "permute, packed", "leaky_rerope", "dual_chunk, packed"),
        *("leaky_rerope, packed decode", "linear attention, packed", "linear attention, step"),
    )
}
# All ops of a function share fakes and gradients: interpreted Triton has few cases, and slow ones.
INTERPRETED = ("rope, packed", "append, packed", "leaky_rerope, packed decode")
# Traced with sizes that are symbols, by AOTAutograd, which takes seconds: one of each function.
TRACED = {
    "rope of learned frequencies", "append, packed", "leaky_rerope", "leaky_rerope, packed decode",
    "linear attention, packed",
}  # fmt: skip
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
EVERYWHERE = [
    pytest.param(name, backend, marks=pytest.mark.thorough if backend == "triton" else ())
    for name, case in CHECKED.items()
    for backend in case.backends
    if backend != "reference"
    if backend != "triton" or name in INTERPRETED or device() == "cuda"
]
# Tensors whose gradients an op gives.
LEAVES = ("q", "k", "v", "inv_freq", "grad_q", "grad_k")
WITHOUT_GRADIENT = (
    "inplace",
    "append",
    "decode",
    "norm_bwd",
    "attention_bwd",
    "former_bwd",
    "step",
)


class Recorded(TorchDispatchMode):
    """The package's ops that run, and copies of their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "extrope":
            copied = tree_map_only(torch.Tensor, lambda x: x.detach().clone(), args)
            self.calls.append((func, copied, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "implementation"), EVERYWHERE)
def test_opcheck(name, implementation):
    dtype = torch.float16 if "rerope" in name else torch.float32
    with Recorded() as ran:
        CHECKED[name](implementation, **CHECKED[name].tensors(0, dtype))
    assert ran.calls
    for op, args, options in {call[0]: call for call in ran.calls}.values():
        if not any(word in op.name() for word in WITHOUT_GRADIENT):
            for argument, x in zip(op._schema.arguments, args):
                given = isinstance(x, torch.Tensor) and argument.name in LEAVES
                if given and not ("norm" in op.name() and argument.name == "inv_freq"):
                    x.requires_grad_()
        traced = ("test_aot_dispatch_dynamic",) if name in TRACED else ()
        torch.library.opcheck(op, args, options, test_utils=(*CHECKS, *traced))


COMPILED = (
    *("rope, packed", "rope after a norm", "append", "permute"),
    *("leaky_rerope, append and decode", "linear attention", "merge"),
)


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_as_one_graph(name):
    """With what it writes in place, and gradients."""
    case = OPERATIONS[name]
    whole = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    given = case.tensors(0, torch.float32)
    found = []
    for function in (case.function, whole):
        own = {key: x.clone() for key, x in given.items()}
        found.append(replace(case, function=function)(None, **own))
    for eager, compiled in zip(*found):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


# A developer's schema, which has an argument that C++ does not know.
LONGER = """
import torch
define = torch.library.Library.define
def longer(library, schema, *args, **options):
    if schema.startswith("rope_fwd("):
        schema = schema.replace(") ->", ", int more=0) ->")
    return define(library, schema, *args, **options)
torch.library.Library.define = longer
from extrope_kernels import apply_rope, methods
apply_rope(torch.zeros(1, 2, 1, 8), methods.rope(8), backend="cpu")
"""


@pytest.mark.skipif(_ext.load("cpu") is not None, reason="about the CPU's kernels")
def test_an_argument_that_cpp_lacks_names_the_file():
    done = subprocess.run([sys.executable, "-c", LONGER], capture_output=True, text=True)
    told = r"rope_fwd takes .*, decay_origin, and its schema .*, decay_origin, more; .*rope_args.h"
    assert re.search(told, done.stderr), done.stderr
