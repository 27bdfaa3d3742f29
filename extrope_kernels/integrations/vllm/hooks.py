"""Where vLLM is stopped for a look: as it makes a configuration, and when a model is loaded."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from .backends import choose_backend
from .engine import engine_of, make_engine
from .settings import NAME, describe, read_settings

LOGGER = logging.getLogger(f"vllm.{NAME}")  # below vLLM's own, for its level and its handler

_SHARED_KEYS = (
    "what kv_transfer_config stores or sends must stay among engines of this same entry: vLLM "
    "tells keys apart by the model and the tokens alone"
)


def check_configurations() -> None:
    """Have every VllmConfig checked where it is made: in the user's process, before any other."""
    from .rotary import forget_shared_layers

    def look(config: Any, complete: Callable[[], None]) -> None:
        if getattr(config.model_config, "is_submodel_config", False):
            return complete()
        forget_shared_layers()
        choose_backend(config)
        complete()
        if config.model_config is not None:
            make_engine(config)
        return None

    _around_configurations(look)


def refuse_configurations(reason: str) -> None:
    """Have every VllmConfig that asks for a method refused, where the plugin could not go in."""

    def look(config: Any, complete: Callable[[], None]) -> None:
        if read_settings(getattr(config, "additional_config", None)) is not None:
            raise RuntimeError(reason)
        complete()

    _around_configurations(look)


def _around_configurations(look: Callable[[Any, Callable[[], None]], None]) -> None:
    from vllm.config import VllmConfig

    complete = VllmConfig.__post_init__
    if getattr(complete, "__module__", None) == __name__:
        return

    @functools.wraps(complete, assigned=("__doc__",))
    def __post_init__(self: Any) -> None:
        look(self, functools.partial(complete, self))

    VllmConfig.__post_init__ = __post_init__


def check_models() -> None:
    """Have every worker's model checked when it is loaded, on all platforms and by any loader."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    # vLLM hands the call on to its worker, whose classes are many.
    load = getattr(WorkerWrapperBase, "load_model", None)
    if getattr(load, "__module__", None) == __name__:
        return

    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = (load or _load_by_worker)(self, *args, **kwargs)
        check_model(self.vllm_config, self.worker.get_model, first=self.rpc_rank == 0)
        return loaded

    WorkerWrapperBase.load_model = load_model


def _load_by_worker(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    return wrapper.worker.load_model(*args, **kwargs)


def check_model(config: Any, get_model: Callable[[], Any], *, first: bool) -> None:
    """Have a loaded model rotate by our layers, or raise ValueError; say what by.

    first: of an engine's workers, which is the one that says it.
    """
    from .attention import attend_for
    from .rotary import extend_model

    engine = engine_of(config)
    if engine is None:
        return
    model = get_model()
    extend_model(model, engine)
    attend_for(model, engine, whole=config.parallel_config.pipeline_parallel_size == 1)
    if first:
        LOGGER.info("%s: %s", NAME, describe(config.additional_config))
        if config.kv_transfer_config is not None:
            LOGGER.warning("%s: %s", NAME, _SHARED_KEYS)
