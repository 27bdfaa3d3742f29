"""The entry point that vLLM calls in each of its processes."""

from __future__ import annotations

import functools
from typing import Any

from .engine import make_engine
from .settings import NAME, read_settings


def register() -> None:
    """Make vLLM read `additional_config={"extrope": ...}`; engines without it stay as they are.

    vLLM calls it through the entry point `extrope` of `vllm.general_plugins`. A second call does
    nothing.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from .rotary import register_rotary_layers

    register_rotary_layers()
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__package__}.cpu.ScoreBackend")
    if (
        AttentionBackendEnum.CUSTOM.value is None
        and not AttentionBackendEnum.CUSTOM.is_overridden()
    ):
        register_backend(AttentionBackendEnum.CUSTOM, f"{__package__}.cuda.ScoreBackend")
    _check_configurations()


def _check_configurations() -> None:
    """Have every VllmConfig checked where it is made: in the user's process, before any other."""
    from vllm.config import VllmConfig

    from .rotary import forget_shared_layers

    complete = VllmConfig.__post_init__
    if getattr(complete, "__module__", None) == __name__:
        return

    @functools.wraps(complete, assigned=("__doc__",))
    def __post_init__(self: Any) -> None:
        if getattr(self.model_config, "is_submodel_config", False):
            return complete(self)
        forget_shared_layers()
        _choose_backend(self)
        complete(self)
        if self.model_config is not None:
            make_engine(self)
        return None

    VllmConfig.__post_init__ = __post_init__


def _choose_backend(config: Any) -> None:
    """Name the attention of a score method where vLLM lets it be named."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    settings = read_settings(config.additional_config)
    if settings is None or settings.score is None:
        return
    if current_platform.is_cpu():
        return  # which has one backend, with ours in its place
    if not current_platform.is_cuda():
        raise ValueError(
            f"{NAME}: a score method must run on CPUs or NVIDIA GPUs, "
            f"got {current_platform.device_name}"
        )
    attention = config.attention_config
    if attention.backend not in (None, AttentionBackendEnum.CUSTOM) or attention.backend_per_kind:
        raise ValueError(
            f"{NAME}: the attention backend must be left to the plugin for a score method, "
            f"got {attention.backend or attention.backend_per_kind}"
        )
    attention.backend = AttentionBackendEnum.CUSTOM
