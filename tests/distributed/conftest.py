"""Four processes for all tests of a worker."""

import pytest
from support.ranks import Ranks

# What takes seconds to import, in every process anew where it is not there when they are forked.
MODELS = (
    "transformers.models.llama.modeling_llama",
    "accelerate",
    "extrope_kernels.integrations.transformers",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
)
COMPILER = ("torch._dynamo.testing", "torch._functorch.aot_autograd")


@pytest.fixture(scope="session")
def ranks(request):
    names = {f"{item.path.stem}::{item.name}" for item in request.session.items}
    of_models = any("context_parallel" in name for name in names)
    compiled = any("compiles" in name or "exported" in name for name in names)
    found = Ranks(preloaded=[*MODELS * of_models, *COMPILER * compiled])
    yield found
    found.stop()
