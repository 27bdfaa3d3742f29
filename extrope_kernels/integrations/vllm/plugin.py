"""The plugin in vLLM: entry point, attention backends, checks of configurations and models."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .._shared.parameters import SPARSE
from .._shared.saved import SAVED
from .auto import choose_entry
from .dual_chunks import adopt_dual_chunk_config
from .engine import engine_of, make_engine
from .latent import adopt_scaling
from .query_scale import adopt_query_scale
from .saved import check_layers, take_saved
from .settings import NAME, OURS, read_entry, read_settings
from .warnings import near_misses, summary, warnings_for

LOGGER = logging.getLogger(f"vllm.{NAME}")  # under vLLM's own, to have its level and handler
_LONGER = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
_BACKENDS = {
    "CPU_ATTN": f"{__package__}.cpu.ScoreBackend",
    "CUSTOM": f"{__package__}.cuda.ScoreBackend",
}


def register() -> None:
    """Make vLLM read `additional_config={"extrope": ...}`, or the extrope.json of a saved model.

    Other engines do not change.

    vLLM calls it through the entry point `extrope` of `vllm.general_plugins`. A second call does
    nothing. If vLLM lacks something that the plugin needs, it only warns and refuses engines
    with a method.
    """
    try:
        _import_all()
    except (ImportError, AttributeError) as error:
        _stay_away(str(error))
        return
    from .rotary import register_rotary_layers

    register_rotary_layers()
    register_backends()
    prepare_models()
    check_configurations()
    check_models()


def _import_all() -> None:
    """Import all that the plugin needs from vLLM, to fail before it changes anything.

    Raises ImportError or AttributeError.
    """
    from vllm.config import VllmConfig
    from vllm.config.model import ModelConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.envs import disable_envs_cache
    from vllm.platforms import current_platform
    from vllm.transformers_utils.repo_utils import get_hf_file_bytes
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from . import cuda, rotary

    used = [
        VllmConfig.__post_init__,
        ModelConfig.supports_multimodal_inputs,
        EngineArgs.create_model_config,
        disable_envs_cache,
        get_hf_file_bytes,
        WorkerWrapperBase,
        register_backend,
        cuda,
    ]
    used += [rotary.rotary_layers._ROPE_DICT, rotary.CustomOp.register_oot]
    for backend in (AttentionBackendEnum.CPU_ATTN, AttentionBackendEnum.CUSTOM):
        used += [backend.is_overridden, backend.get_path]
    if current_platform.is_cpu():
        from . import cpu  # replaces vLLM's, for engines without a method too

        used.append(cpu)


@functools.cache
def _stay_away(missing: str) -> None:
    """Warn, and refuse engines with a method."""
    import vllm

    version = getattr(vllm, "__version__", "of an unknown version")
    reason = f"{NAME}: vLLM must have what the plugin builds on, got {version}: {missing}"
    try:
        refuse_configurations(reason)
    except (ImportError, AttributeError):
        reason += '; additional_config={"extrope": ...} has no effect'
    LOGGER.warning("%s", reason)


def register_backends() -> None:
    """Register our backends; a backend of an earlier plugin stays."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for name, ours in _BACKENDS.items():
        backend = AttentionBackendEnum[name]
        if not backend.is_overridden():
            register_backend(backend, ours)


def choose_backend(config: Any) -> None:
    """Choose our attention backend, if vLLM has a choice.

    Raises ValueError if the backend would not be ours: nothing would rotate queries and keys.
    """
    backend = backend_for(config)
    if backend is not None:
        config.attention_config.backend = backend


def backend_for(config: Any) -> Any:
    """Return the attention backend that a VllmConfig must name; None if none.

    Raises ValueError as `choose_backend`.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    settings = read_settings(config.additional_config)
    if settings is None or not settings.attends:
        return None
    if current_platform.is_cpu():
        _check_is_ours(AttentionBackendEnum.CPU_ATTN)  # the only one there
        return None
    if not current_platform.is_cuda():
        raise ValueError(
            f"{NAME}: {OURS} must run on CPUs or NVIDIA GPUs, got {current_platform.device_name}"
        )
    attention = config.attention_config
    if attention.backend not in (None, AttentionBackendEnum.CUSTOM) or attention.backend_per_kind:
        raise ValueError(
            f"{NAME}: the attention backend must be left to the plugin for {OURS}, "
            f"got {attention.backend or attention.backend_per_kind}"
        )
    _check_is_ours(AttentionBackendEnum.CUSTOM)
    return AttentionBackendEnum.CUSTOM


def _check_is_ours(backend: Any) -> None:
    ours, found = _BACKENDS[backend.name], backend.get_path()
    if found != ours:
        raise ValueError(
            f"{NAME}: vLLM's attention backend {backend.name} must be {ours} for {OURS}, "
            f"got {found} of another plugin"
        )


def check_configurations() -> None:
    """Check every VllmConfig when it is made: in the user's process, before any other starts."""
    from .rotary import forget_shared_layers

    def look(config: Any, complete: Callable[[], None]) -> None:
        if getattr(config.model_config, "is_submodel_config", False):
            return complete()
        forget_shared_layers()
        if chosen := choose_entry(config, backend_for):
            LOGGER.info("%s: %s", NAME, chosen)
        if read_entry(config.additional_config) is not None:
            if adopt_dual_chunk_config(config):
                LOGGER.warning("%s: %s", NAME, SPARSE)
            adopt_query_scale(config)
            adopt_scaling(config)
        choose_backend(config)
        complete()
        if config.model_config is not None:
            engine = make_engine(config)
            for warning in warnings_for(config, None if engine is None else engine.settings):
                LOGGER.warning("%s: %s", NAME, warning)
        return None

    _around_configurations(look)


def prepare_models() -> None:
    """Take the entry of a saved model, and let an engine with a method exceed its model's length.

    That is the purpose of methods. vLLM requires an environment variable for it.
    """
    from vllm.engine.arg_utils import EngineArgs

    make = EngineArgs.create_model_config
    if getattr(make, "__module__", None) == __name__:
        return

    @functools.wraps(make, assigned=("__doc__",))
    def create_model_config(self: Any) -> Any:
        given = self.additional_config
        for warning in near_misses(given):  # before vLLM refuses a length
            LOGGER.warning("%s: %s", NAME, warning)
        content = _saved_content(self.model, self.revision)
        if content is not None:
            self.additional_config, said = take_saved(given, self.model, content)
            LOGGER.info("%s: %s", NAME, said)
        if read_entry(self.additional_config) is None:
            return make(self)
        with _longer_models():
            made = make(self)
        if self.additional_config is not given:
            check_layers(self.model, content, made.hf_text_config)
        return made

    EngineArgs.create_model_config = create_model_config


def _saved_content(model: str, revision: str | None) -> bytes | None:
    """Return the content of a model's extrope.json; None without one."""
    from huggingface_hub.errors import HFValidationError
    from vllm.transformers_utils.repo_utils import get_hf_file_bytes

    try:
        return get_hf_file_bytes(SAVED, model, revision)
    except HFValidationError:  # neither a folder nor a name on the Hub: a file, a bucket
        return None


@contextmanager
def _longer_models() -> Iterator[None]:
    from vllm.envs import disable_envs_cache

    before = os.environ.get(_LONGER)
    disable_envs_cache()  # an earlier engine's; the next start enables it again
    os.environ[_LONGER] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_LONGER]
        else:
            os.environ[_LONGER] = before


def refuse_configurations(reason: str) -> None:
    """Refuse every VllmConfig with a method, if the plugin could not be installed."""

    def look(config: Any, complete: Callable[[], None]) -> None:
        if read_entry(getattr(config, "additional_config", None)) is not None:
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
    """Check every worker's model when it is loaded, on all platforms and by any loader."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    # vLLM passes the call on to its worker, which has many classes.
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
    """Make a loaded model rotate by our layers, and log its methods, or raise ValueError.

    first: True in the one worker of an engine that logs.
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
        LOGGER.info("%s: %s", NAME, summary(engine.settings, config))
