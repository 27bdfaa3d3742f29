"""Four processes for all tests of a worker."""

import pytest
from ranks import Ranks

# What takes seconds to import, in every process anew where it is not there when they are forked.
MODELS = (
    "transformers.models.llama.modeling_llama",
    "accelerate",
    "extrope_kernels.integrations.transformers",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
)


@pytest.fixture(scope="session")
def ranks(request):
    of_models = any("context_parallel" in item.path.name for item in request.session.items)
    found = Ranks(preloaded=MODELS * of_models)
    yield found
    found.stop()
