"""Four processes for all tests of a worker."""

import pytest
from ranks import Ranks

# What takes seconds to import, in every process anew where it is not there when they are forked.
MODELS = ("transformers.models.llama.modeling_llama", "transformers.models.gemma3", "accelerate")


@pytest.fixture(scope="session")
def ranks(request):
    of_models = any("models" in item.path.name for item in request.session.items)
    found = Ranks(preloaded=MODELS * of_models)
    yield found
    found.stop()
