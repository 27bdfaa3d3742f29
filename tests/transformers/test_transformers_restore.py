"""What `extend` leaves alone, what `restore` puts back, what is refused, and wrapped models."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import sys
from functools import partial

import pytest
import torch
from support import tiny_models
from support.hf_models import (
    ATTENDING,
    FAMILIES,
    CountOps,
    build,
    generate,
    logits,
    pairs,
    rotary_of,
    since,
    tokens,
    transformers,
)
from torch import nn

from extrope_kernels import restore
from extrope_kernels.integrations.transformers import extend

IDS = tokens(2, 40)


def apply_of(model):
    return sys.modules[type(model).__module__].apply_rotary_pos_emb


PARAMETERS = {
    "yarn": {"factor": 4.0},
    "dynamic_ntk": {"factor": 4.0},
    "leaky_rerope": {"window": 8, "factor": 4.0},
    "string": {"shift": 9, "window": 2},
}


@pytest.mark.parametrize(("family", "method"), pairs(FAMILIES, PARAMETERS))
def test_restore_is_exact(family, method):
    model = build(family, **ATTENDING[family])
    before, function, config = logits(model, IDS), apply_of(model), model.config.to_dict()
    state, attributes = model.state_dict(), [set(vars(m)) for m in model.modules()]
    configs = [vars(m).get("config") for m in model.modules()]
    implementation = model.config._attn_implementation
    handle = extend(model, method, **PARAMETERS[method])
    assert model.config.to_dict() == config
    assert model.state_dict().keys() == state.keys()
    assert not torch.equal(logits(model, IDS), before)
    handle.restore()
    assert torch.equal(logits(model, IDS), before)
    assert apply_of(model) is function
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert all(vars(m).get("config") is c for m, c in zip(model.modules(), configs))
    assert model.config._attn_implementation == implementation
    assert "forward" not in vars(rotary_of(model))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    handle.restore()
    assert torch.equal(logits(model, IDS), before)


def test_restore_after_an_exception():
    model = build("llama")
    before, function = logits(model, IDS), apply_of(model)
    with pytest.raises(KeyError), extend(model, "dynamic_ntk", factor=4.0):
        logits(model, IDS)
        raise KeyError
    assert torch.equal(logits(model, IDS), before)
    assert apply_of(model) is function
    with extend(model, "dynamic_ntk", factor=4.0):
        with pytest.raises(IndexError):
            model.generate(IDS + 1000, max_new_tokens=2)
        got = logits(model, IDS[:, :8])
    with extend(model, "rope"):  # the request that failed does not lend its length to the next
        assert torch.equal(got, logits(model, IDS[:, :8]))


@pytest.mark.parametrize(
    ("method", "parameters"), [("pi", {"factor": 2.0}), ("rerope", {"window": 7})]
)
def test_a_function_that_replaces_the_models_own_later(method, parameters, monkeypatch):
    """As Liger does, also in a Trainer that starts after `extend`."""
    gc.collect()  # models of earlier tests, which lie in cycles, still use the function
    model = build("llama")
    with extend(model, method, **parameters):
        want = logits(model, IDS)
    own = logits(model, IDS)
    module, function = sys.modules[type(model).__module__], apply_of(model)
    monkeypatch.setattr(module, "apply_rotary_pos_emb", function)  # which comes back at the end

    def theirs(*args):
        return function(*args)

    with extend(model, method, **parameters):
        module.apply_rotary_pos_emb = theirs
        assert torch.equal(logits(model, IDS), want)
    assert apply_of(model) is theirs
    assert torch.equal(logits(model, IDS), own)


def test_nested_extensions_restore_last_first():
    model = build("llama")
    before = logits(model, IDS)
    outer = extend(model, "pi", factor=2.0)
    with_pi = logits(model, IDS)
    inner = extend(model, "dynamic_ntk", factor=4.0)
    assert not torch.equal(logits(model, IDS), with_pi)
    with pytest.raises(RuntimeError, match="extend: the extension by pi must be the model's last"):
        outer.restore()
    inner.restore()
    assert torch.equal(logits(model, IDS), with_pi)
    outer.restore()
    assert torch.equal(logits(model, IDS), before)
    with pytest.raises(ValueError, match="a handle must be entered before restore"), outer:
        pass


@pytest.mark.parametrize("method", ["yarn", "dynamic_ntk"])
def test_a_wrapper_that_generate_got_since_stays(method):
    """FSDP's, which accelerate registers as it prepares a model."""
    model = build("llama")
    want = generate(model, IDS, max_new_tokens=3)
    with extend(model, method, factor=4.0):
        model.generate = partial(model.generate)
        assert not torch.equal(generate(model, IDS, max_new_tokens=3), want)
    assert isinstance(vars(model)["generate"], partial)
    assert torch.equal(generate(model, IDS, max_new_tokens=3), want)


def test_other_models_of_the_class_are_untouched():
    model, other = build("llama"), build("llama")
    function, before = apply_of(model), logits(model, IDS)
    handle = extend(model, "pi", factor=4.0)
    assert torch.equal(logits(other, IDS), before)
    assert torch.equal(logits(copy.deepcopy(other), IDS), before)
    second = extend(other, "yarn", factor=2.0)
    handle.restore()
    assert torch.equal(logits(model, IDS), before)
    assert not torch.equal(logits(other, IDS), before)
    assert apply_of(model) is not function
    second.restore()
    assert torch.equal(logits(other, IDS), before)
    assert apply_of(model) is function


def test_the_function_that_stands_in_is_copied_by_name():
    """As the model's own: some layers keep it."""
    model = build("llama")
    with extend(model, "yarn", factor=4.0):
        function = apply_of(model)
        assert function is copy.deepcopy(function) is pickle.loads(pickle.dumps(function))


@pytest.mark.parametrize(("family", "method"), pairs(["llama", "gemma2"], PARAMETERS))
def test_copies_and_pickles_of_an_extended_model_stay_extended_until_restored(family, method):
    since("5.6", "layers hold the function that extend stands in for, which pickles by its name")
    model = build(family, **ATTENDING[family])
    try:
        torch.save(model, io.BytesIO())
    except AttributeError as error:  # of transformers 5.20, Python 3.10's last, beside `kernels`
        pytest.skip(f"a plain model cannot be pickled either: {error}")
    before, attributes = logits(model, IDS), [sorted(vars(each)) for each in model.modules()]
    with extend(model, method, **PARAMETERS[method]):
        expected = logits(model, IDS)
        twin, file = copy.deepcopy(model), io.BytesIO()
        torch.save(model, file)
        restored = copy.deepcopy(model)
        restore(restored)
        assert torch.equal(logits(restored, IDS), before)
        assert torch.equal(logits(model, IDS), expected)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    for extended in (twin, loaded):
        logits(extended, IDS[:, :4])
        assert torch.equal(logits(extended, IDS), expected)
        restore(extended)
        assert torch.equal(logits(extended, IDS), before)
        assert [sorted(vars(each)) for each in extended.modules()] == attributes
        assert not any(each._forward_pre_hooks for each in extended.modules())
    assert torch.equal(logits(model, IDS), before) and not torch.equal(before, expected)


@pytest.mark.parametrize("method", PARAMETERS)
def test_base_models_and_saved_ones(tmp_path, method):
    """A model without its head is extended with it; what is saved is the plain model."""
    model = build("llama")
    base, plain = model.model, logits(model, IDS)
    before = base(IDS).last_hidden_state
    with extend(base, method, **PARAMETERS[method]):
        got = base(IDS).last_hidden_state
    with extend(model, method, **PARAMETERS[method]):
        assert torch.equal(base(IDS).last_hidden_state, got)
        with pytest.warns(UserWarning, match=f"its extension by {method} is in extrope.json"):
            model.save_pretrained(tmp_path)
    assert torch.equal(base(IDS).last_hidden_state, before)
    assert not torch.equal(got, before)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, IDS), plain)


def test_a_rotation_that_the_op_does_not_have_keeps_its_tables(monkeypatch):
    model = build("llama")
    module, own = sys.modules[type(model).__module__], apply_of(model)
    monkeypatch.setattr(
        module, "apply_rotary_pos_emb", lambda q, k, cos, sin, *dim: own(q, k, cos, -sin, *dim)
    )
    with extend(model, "pi", factor=2.0), CountOps() as count:
        got = logits(model, IDS)
    assert count.rotations == 0
    inv_freq = rotary_of(model).inv_freq
    inv_freq /= 2
    assert torch.equal(logits(model, IDS), got)
    message = "one table rotates its queries and keys, but xpos needs two"
    with pytest.raises(ValueError, match=message):
        extend(model, "xpos")


def test_angles_that_are_not_frequencies_times_positions_are_refused(monkeypatch):
    model = build("llama")
    rotary = type(rotary_of(model))
    forward = rotary.forward
    monkeypatch.setattr(rotary, "forward", lambda self, x, at: forward(self, x, at * at))
    with pytest.raises(ValueError, match="its angles are not its frequencies times the positions"):
        extend(model, "yarn", factor=2.0)


def test_refuses_positions_of_several_axes_in_a_forward():
    model = build("llama")
    with extend(model, "yarn", factor=2.0), pytest.raises(ValueError, match="extend: position_ids"):
        rotary_of(model)(torch.zeros(1), torch.zeros(3, 1, 4, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "method, parameters", [("yarn", {"factor": 4.0}), ("rerope", {"window": 6})]
)
def test_default_dtypes_are_not_those_of_trials(method, parameters, dtype):
    model, ids = build("qwen3"), tokens(1, 20)
    with extend(model, method, **parameters):
        want = logits(model, ids)
    torch.set_default_dtype(dtype)
    try:
        with extend(model, method, **parameters):
            got = logits(model, ids)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)


def test_offloaded_embeddings():
    """accelerate's weights are on meta between forwards."""
    accelerate = pytest.importorskip("accelerate")
    model, ids = build("llama"), tokens(1, 20)
    with extend(model, "rerope", window=6):
        want = logits(model, ids)
    accelerate.cpu_offload(model, "cpu")
    with extend(model, "rerope", window=6):
        assert torch.equal(logits(model, ids), want)


def test_a_wrapper_extends_the_model_in_it():
    """However the wrapper is called, or taken off, a request's length is known."""
    ids, parameters = tokens(1, 20), {"factor": 4.0, "max_position_embeddings": 8}
    model = build("llama")
    with extend(model, "dynamic_ntk", **parameters):
        want = generate(model, ids, max_new_tokens=6)
    wrapper = torch.compile(model, backend="eager")
    with extend(wrapper, "dynamic_ntk", **parameters):
        for outside in (wrapper, model):
            torch.testing.assert_close(generate(outside, ids, max_new_tokens=6), want)


@pytest.mark.parametrize("method", ["dynamic_ntk", "rerope"])
def test_a_forward_that_is_called_by_itself(method):
    """As sentence-transformers does: it passes hooks by."""
    parameters = {"rerope": {"window": 6}, "dynamic_ntk": {"factor": 4.0}}[method]
    model = build("llama").model
    with torch.no_grad(), extend(model, method, **parameters):
        want = [model(IDS[:, :length]).last_hidden_state for length in (40, 20)]
        got = [model.forward(IDS[:, :length]).last_hidden_state for length in (40, 20)]
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        assert next(iter(inspect.signature(model.forward).parameters)) == "input_ids"


class Wrapper(nn.Module):
    """Knows nothing of transformers, and calls something else its config."""

    def __init__(self, *parts):
        super().__init__()
        self.config = {"parts": len(parts)}
        self.parts = nn.ModuleList(parts)


@torch.no_grad()
def test_a_wrapper_leaves_the_vision_tower_alone():
    model, ids = tiny_models.build("Mistral3ForConditionalGeneration"), tokens(1, 20)
    generator = torch.Generator().manual_seed(1)
    image = {
        "pixel_values": torch.randn(1, 3, 32, 32, generator=generator),
        "image_sizes": torch.tensor([[32, 32]]),
    }
    seen = model.model.vision_tower(**image).last_hidden_state
    with extend(model, "pi", factor=4.0):
        want = logits(model, ids)
    with extend(Wrapper(model), "pi", factor=4.0):
        assert torch.equal(logits(model, ids), want)
        assert torch.equal(model.model.vision_tower(**image).last_hidden_state, seen)
