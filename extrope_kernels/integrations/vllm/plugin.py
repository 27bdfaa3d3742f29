"""The entry point that vLLM calls in each of its processes."""

from __future__ import annotations

import functools

from .settings import NAME


def register() -> None:
    """Make vLLM read `additional_config={"extrope": ...}`; engines without it stay as they are.

    vLLM calls it through the entry point `extrope` of `vllm.general_plugins`. A second call does
    nothing. A vLLM that lacks something stays as it is, but for a warning, and for engines that ask
    for a method, which are refused.
    """
    try:
        _import_all()
    except (ImportError, AttributeError) as error:
        _stay_away(str(error))
        return
    from .backends import register_backends
    from .hooks import check_configurations, check_models
    from .rotary import register_rotary_layers

    register_rotary_layers()
    register_backends()
    check_configurations()
    check_models()


def _import_all() -> None:
    """Touch what is needed of vLLM, so that whatever is missing shows before anything is changed.

    Raises ImportError or AttributeError.
    """
    from vllm.config import VllmConfig
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from . import cuda, rotary

    used = [VllmConfig.__post_init__, WorkerWrapperBase, register_backend, cuda]
    used += [rotary.rotary_layers._ROPE_DICT, rotary.CustomOp.register_oot]
    for backend in (AttentionBackendEnum.CPU_ATTN, AttentionBackendEnum.CUSTOM):
        used += [backend.is_overridden, backend.get_path]
    if current_platform.is_cpu():
        from . import cpu  # in the place of vLLM's, for engines without a method as well

        used.append(cpu)


@functools.cache
def _stay_away(missing: str) -> None:
    """Warn, and have engines refused that ask for a method."""
    import vllm

    from .hooks import LOGGER, refuse_configurations

    version = getattr(vllm, "__version__", "of an unknown version")
    reason = f"{NAME}: vLLM must have what the plugin builds on, got {version}: {missing}"
    try:
        refuse_configurations(reason)
    except (ImportError, AttributeError):
        reason += '; additional_config={"extrope": ...} has no effect'
    LOGGER.warning("%s", reason)
