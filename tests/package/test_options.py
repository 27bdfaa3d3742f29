"""The keyword arguments that all attention functions share are those that are named once."""

import inspect

import pytest
from score_examples import EXAMPLES

from extrope_kernels.ops._shared.options import AttentionOptions, CacheOptions

FUNCTIONS = {example.attention.__name__: example for example in EXAMPLES.values()}


@pytest.mark.parametrize("with_kvcache", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_show_them(name, with_kvcache):
    """To help(), to type checkers, and as what a function really takes."""
    example, options = FUNCTIONS[name], CacheOptions if with_kvcache else AttentionOptions
    function = example.with_kvcache if with_kvcache else example.attention
    parameters = inspect.signature(function).parameters.values()
    shown = {x.name for x in parameters if x.kind is x.KEYWORD_ONLY}
    own = {*example.parameters, "factor", "grouped", "cache_seqlens"}
    assert shown - own == {*options.__required_keys__, *options.__optional_keys__}
