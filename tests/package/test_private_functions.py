"""What PyTorch has no public function for: used in one module, and each use does what it is for."""

import re
from pathlib import Path

import pytest
import torch

import extrope_kernels
from extrope_kernels.ops._shared import autograd

ROOT = Path(extrope_kernels.__file__).parent
HOME = "ops/_shared/autograd.py"
PRIVATE = (
    r"torch\._(C|functorch|dynamo)\b|_dynamo_marked_constant|forward_ad\._|_SingleLevelFunction"
)


def test_one_module_uses_private_functions_of_torch():
    found = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if re.search(PRIVATE, path.read_text())
    }
    assert found == {HOME}


# -------------------------------------------------------------------------------------------------
# An op y = x ** 3 whose kernel, as compiled ones, knows nothing of autograd


def save(ctx, args, options, outputs):
    ctx.save_for_backward(*args)


@pytest.fixture(scope="module")
def ops():
    library = torch.library.Library("extrope_test_private", "FRAGMENT")
    ops = torch.ops.extrope_test_private
    for name, schema, function in (
        ("cube", "(Tensor x) -> Tensor", lambda x: x.detach() ** 3),
        ("stop", "(Tensor x) -> Tensor", lambda x: x.detach() + 1),
        ("double_", "(Tensor(a!) x) -> ()", lambda x: [x.detach().mul_(2)][:0] or None),
    ):
        library.define(name + schema)
        library.impl(name, function, "CPU")
        fake = torch.empty_like if name != "double_" else lambda x: None
        torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
    cube = ops.cube.default
    autograd.register_backward(
        library, cube, save, lambda ctx, grad: (3 * ctx.saved_tensors[0] ** 2 * grad,)
    )
    torch.library.register_vmap(cube, lambda info, dims, x: (cube(x), dims[0]), lib=library)
    autograd.refuse_backward(library, ops.stop.default, "stop: no gradient")
    autograd.refuse_recording(library, ops.double_.default, "double_: for inference")
    yield ops
    library._destroy()


X = torch.tensor([1.0, 2.0, -3.0])
TRANSFORMS = {
    "grad": lambda f: torch.func.grad(lambda x: f(x).sum())(X),
    "grad of grad": lambda f: torch.func.grad(
        lambda x: torch.func.grad(lambda y: f(y).sum())(x).sum()
    )(X),
    "vjp": lambda f: torch.func.vjp(f, X)[1](X)[0],
    "jacrev": lambda f: torch.func.jacrev(f)(X),
    # These two register_autograd gets wrong in silence.
    "vmap of grad": lambda f: torch.vmap(torch.func.grad(lambda x: f(x).sum()))(X[:, None]),
    "grad of vmap": lambda f: torch.func.grad(lambda x: torch.vmap(f)(x[:, None]).sum())(X),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func(ops, name):
    transform = TRANSFORMS[name]
    assert torch.equal(transform(ops.cube), transform(lambda x: x**3))


def test_forward_mode_is_refused_not_lost(ops):
    for transform in (
        lambda: torch.func.jvp(ops.cube, (X,), (X,)),
        lambda: torch.func.jvp(torch.func.grad(lambda x: ops.cube(x).sum()), (X,), (X,)),
    ):
        with pytest.raises(NotImplementedError, match="cube: has no forward-mode derivatives"):
            transform()


def test_compiled_autograd(ops):
    x = X.clone().requires_grad_()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        ops.cube(x).sum().backward()
    assert torch.equal(x.grad, 3 * X**2)


def test_a_call_without_a_record(ops):
    x = X.clone().requires_grad_()
    assert ops.cube(x).requires_grad
    assert not autograd.call_unrecorded(ops.cube, (x,), {}).requires_grad


def test_gradients_and_writes_that_are_refused(ops):
    x = X.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="stop: no gradient"):
        ops.stop(x).sum().backward()
    with pytest.raises(RuntimeError, match="double_: for inference"):
        ops.double_(x)
    saved = X.clone()
    out = x * saved
    ops.double_(saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_what_runs_around_a_call():
    seen = []
    torch.vmap(lambda x: seen.append(autograd.in_func_transform()) or x)(X)
    with torch.autograd.forward_ad.dual_level():
        seen.append(autograd.in_forward_mode())
    assert seen == [True, True]
    assert not autograd.in_func_transform() and not autograd.in_forward_mode()


def test_a_constant_of_compiled_graphs():
    @autograd.constant_when_compiled
    def chosen():
        return len(list(Path("/").iterdir())) > 0  # nothing that a graph may hold

    assert torch.compile(lambda x: x + chosen(), fullgraph=True, backend="eager")(X).equal(X + 1)
