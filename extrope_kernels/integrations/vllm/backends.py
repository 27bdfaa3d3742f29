"""vLLM's attention backends: ours in two of its places, and the one that an engine is given."""

from __future__ import annotations

from typing import Any

from .settings import NAME, read_settings

_OURS = {
    "CPU_ATTN": f"{__package__}.cpu.ScoreBackend",
    "CUSTOM": f"{__package__}.cuda.ScoreBackend",
}


def register_backends() -> None:
    """Register ours; where another plugin was first, its backend stays."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for name, ours in _OURS.items():
        backend = AttentionBackendEnum[name]
        if not backend.is_overridden():
            register_backend(backend, ours)


def choose_backend(config: Any) -> None:
    """Name the attention of a score method where vLLM lets it be named.

    Raises ValueError where that would not be ours: queries and keys would not be rotated at all.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    settings = read_settings(config.additional_config)
    if settings is None or settings.score is None:
        return
    if current_platform.is_cpu():
        _check_is_ours(AttentionBackendEnum.CPU_ATTN)  # the only one there
        return
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
    _check_is_ours(AttentionBackendEnum.CUSTOM)
    attention.backend = AttentionBackendEnum.CUSTOM


def _check_is_ours(backend: Any) -> None:
    ours, found = _OURS[backend.name], backend.get_path()
    if found != ours:
        raise ValueError(
            f"{NAME}: vLLM's attention backend {backend.name} must be {ours} for a score method, "
            f"got {found} of another plugin"
        )
