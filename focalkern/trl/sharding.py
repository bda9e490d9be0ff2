"""What is asked of accelerate's engines before they shard a model. Used by the trainer and by `patch`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate.state import AcceleratorState

_NARROW = (torch.bfloat16, torch.float16)


def keep_output_dtype(state: AcceleratorState) -> None:
    """Let a model under FSDP2 return its log-probs in float32, as the head computes them.

    accelerate's policy for mixed precision rounds every output as well (`output_dtype`): a log-prob of −3 by
    up to 2^-7 in bf16, and with all tokens of a completion its sum by whole nats.
    """
    if not state.is_fsdp2:
        return
    policy = state.fsdp_plugin.mixed_precision_policy
    if policy is not None and policy.output_dtype in _NARROW:
        state.fsdp_plugin.mixed_precision_policy = replace(policy, output_dtype=None)


def check_sequences_are_whole(parallelism: Any) -> None:
    """Raise ValueError where a rank would hold a slice of each sequence: scores are sums over whole ones."""
    for name in ("cp_size", "sp_size"):
        size = getattr(parallelism, name, 1)
        if size > 1:
            raise ValueError(
                f"{name} of parallelism_config must be 1; got {size}: log-probs would be summed over a slice"
                " of each sequence. In a loop of your own the losses take sequence_group="
            )
