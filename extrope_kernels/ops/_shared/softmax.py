"""What a call asks of the softmax beside its logits, in plain PyTorch: caps and sinks."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_call import AttentionCall


def capped(logits: Tensor, call: AttentionCall) -> Tensor:
    """softcap * tanh(logits / softcap), or the logits where there is no cap."""
    return logits if not call.softcap else call.softcap * torch.tanh(logits / call.softcap)


def softmax_of(logits: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """The weights of keys, and the log-sum-exp of the logits with that of the sink.

    logits: (batch, heads_q, seqlen_q, seqlen_k), -inf for keys that are not seen. Rows that see no
    key have weights 0; what they get on the way is not used, but finite, so that gradients are.
    """
    empty = (logits == -torch.inf).all(-1)
    lse = torch.logsumexp(logits.masked_fill(empty[..., None], 0.0), dim=-1)
    if call.sinks is None:
        weights = torch.exp(logits - lse[..., None])
        return weights, lse.masked_fill(empty, -torch.inf)
    sinks = call.sinks.to(logits.dtype)[:, None].expand(lse.shape)
    lse = torch.where(empty, sinks, torch.logaddexp(lse, sinks))
    # A sink that is switched off by -inf is nothing that a row without keys could see.
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    return torch.exp(logits - finite[..., None]), lse


def grad_of_sinks(
    sinks: Tensor, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> Tensor:
    """The gradient of a call's sinks (heads_q,), from its outputs and their gradients.

    out, dout: (batch, seqlen_q, heads_q, head_dim), or packed (total, heads_q, head_dim); lse,
    dlse: (batch, heads_q, seqlen_q) or (heads_q, total), of all logits and the sink.
    """
    delta = torch.linalg.vecdot(dout.to(lse.dtype), out.to(lse.dtype)).transpose(-1, -2)
    if dlse is not None:
        delta = delta - dlse
    # A row without keys whose sink is switched off by -inf has neither.
    share = torch.exp((sinks[:, None] - lse).masked_fill(lse == -torch.inf, -torch.inf))
    found = -share * delta
    return found.movedim(-2, 0).flatten(1).sum(1).to(sinks.dtype)
