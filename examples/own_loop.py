"""FocalPO in a training loop of your own, on one process or several: the losses come out the same.

    python examples/own_loop.py
    torchrun --nproc_per_node 2 examples/own_loop.py --engine fsdp2     # or ddp, zero3, vocabulary, sequence

`Policy` is what an engine wraps: its forward runs the fused head inside the head module's own call, where the
weight is whole, whoever shards it. `wrap` is what differs from engine to engine, and `part_of_rank`: DDP,
FSDP2 and ZeRO-3 take a part of the pairs on each rank; "vocabulary", a tensor-parallel plan, all pairs and a
part of the head; "sequence", DeepSpeed's Ulysses attention, all pairs and a part of the tokens of each.

The model is a small Llama of random weights, the pairs are docstrings (see `preference_data.py`).
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from preference_data import IGNORE_INDEX, Batch, PreferenceSet, TokenIds, docstring_pairs, encode_pairs
from quickstart_parts import train_tokenizer
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from focalkern import FusedFocalPOLoss, lm_head_logps

ENGINES = ("none", "ddp", "fsdp2", "zero3", "vocabulary", "sequence")
PAIRS_PER_STEP = 8
LR = 1e-3

# Runs a step: from the loss to the next weights.
Update = Callable[[torch.Tensor], None]


@dataclass
class Part:
    """What one rank has of a batch: right-padded rows, with each label beside the token that predicts it."""

    ids: torch.Tensor  # [2B, T]
    labels: torch.Tensor  # [2B, T]
    positions: torch.Tensor  # [2B, T]
    ref_logps: torch.Tensor | None  # [2, B]


class Policy(nn.Module):
    """A causal language model and the loss of its log-probs."""

    def __init__(self, model: PreTrainedModel, loss_fn: FusedFocalPOLoss) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn
        self.sequence_group: dist.ProcessGroup | None = None

    def forward(self, part: Part) -> torch.Tensor:
        """The loss; without reference log-probs, the policy's own [2, pairs]."""
        hidden = self.model.model(part.ids, position_ids=part.positions, use_cache=False).last_hidden_state
        tokens = lm_head_logps(self.model.lm_head, hidden, part.labels)
        if part.ref_logps is None:
            return tokens.logps.sum(-1).view(2, -1)
        group = self.sequence_group
        return self.loss_fn.from_logps(tokens, part.labels, *part.ref_logps, sequence_group=group).loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--engine", choices=ENGINES, default="none")
    parser.add_argument("--steps", type=int, default=10, help="default: %(default)s")
    args = parser.parse_args()
    if args.engine == "none" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SystemExit("torchrun starts several ranks: name an --engine")
    with process_group(args.engine) as device:
        losses = train(args.engine, args.steps, device)
        if not dist.is_initialized() or dist.get_rank() == 0:
            ranks = dist.get_world_size() if dist.is_initialized() else 1
            print(f"--engine {args.engine}, {ranks} rank(s), loss of each step (the same for every engine):")
            print(" ".join(f"{loss:.5f}" for loss in losses))


def train(engine: str, steps: int, device: torch.device) -> list[float]:
    """The losses of the steps, each of all pairs of its batch, the same on every rank."""
    data, policy = prepare(device)
    batches = list(data.shuffled(steps, seed=0))
    with torch.no_grad():
        refs = [policy(whole(data.batch(indices))) for indices in batches]

    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    wrapped, update = wrap(engine, policy)
    losses = []
    for indices, ref_logps in zip(tqdm(batches, disable=rank > 0), refs, strict=True):
        loss = wrapped(part_of_rank(engine, rank, ranks, data, indices, ref_logps))
        update(loss)
        mean = loss.detach() / ranks
        if ranks > 1:
            dist.all_reduce(mean)
        losses.append(mean.item())
    return losses


def whole(batch: Batch, ref_logps: torch.Tensor | None = None) -> Part:
    labels = nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    positions = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    return Part(batch.ids, labels, positions, ref_logps)


def part_of_rank(
    engine: str, rank: int, ranks: int, data: PreferenceSet, indices: list[int], ref_logps: torch.Tensor
) -> Part:
    if engine == "vocabulary":
        return whole(data.batch(indices), ref_logps)
    if engine == "sequence":
        part = whole(data.batch(indices), ref_logps)
        short = -part.ids.shape[1] % ranks  # of slices that are equally long
        ids, labels = (
            nn.functional.pad(x, (0, short), value=value).chunk(ranks, dim=1)[rank].contiguous()
            for x, value in ((part.ids, 0), (part.labels, IGNORE_INDEX))
        )
        start = rank * ids.shape[1]
        positions = torch.arange(start, start + ids.shape[1], device=ids.device).expand_as(ids).contiguous()
        return Part(ids, labels, positions, ref_logps)
    own = slice(rank, None, ranks)  # of the pairs
    return whole(data.batch(indices[own]), ref_logps[:, own])


def wrap(engine: str, policy: Policy) -> tuple[nn.Module, Update]:
    """The policy under an engine, and its step."""
    if engine == "zero3":
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": PAIRS_PER_STEP // dist.get_world_size(),
            "zero_optimization": {"stage": 3},
            "gradient_clipping": 0.0,  # DeepSpeed's own default is 1.0
            "zero_allow_untested_optimizer": True,
        }
        sharded, *_ = deepspeed.initialize(model=policy, optimizer=adamw(policy), config=config)

        def update_sharded(loss: torch.Tensor) -> None:
            sharded.backward(loss)
            sharded.step()

        return sharded, update_sharded

    wrapped: nn.Module = policy
    if engine == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(policy)
    elif engine == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in policy.model.model.layers:
            fully_shard(layer)
        fully_shard(policy)
    elif engine == "vocabulary":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        mesh = init_device_mesh(policy.model.device.type, (dist.get_world_size(),))
        parallelize_module(policy.model, mesh, {"lm_head": ColwiseParallel()})
    elif engine == "sequence":
        import deepspeed
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        deepspeed.init_distributed(dist_backend=dist.get_backend())
        mpu = UlyssesSPAttentionHF.register_with_transformers(
            policy.model,
            core_attn_implementation=policy.model.config._attn_implementation,
            sequence_parallel_size=dist.get_world_size(),
            micro_batch_size=2 * PAIRS_PER_STEP,
        )
        policy.sequence_group = mpu.get_sequence_parallel_group()
        wrapped = nn.parallel.DistributedDataParallel(policy)
    optimizer = adamw(policy)

    def update(loss: torch.Tensor) -> None:
        if policy.sequence_group is not None:
            # The gradients of the slices are to be added up, and DDP takes their mean.
            loss = loss * policy.sequence_group.size()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return wrapped, update


def adamw(policy: Policy) -> torch.optim.Optimizer:
    # Element by element: the "vocabulary" head is a DTensor beside plain parameters.
    return torch.optim.AdamW(policy.parameters(), lr=LR, foreach=False)


def prepare(device: torch.device) -> tuple[PreferenceSet, Policy]:
    tokenizer, encoded = tokenized_pairs()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    policy = Policy(LlamaForCausalLM(config), FusedFocalPOLoss(beta=0.5, gamma=0.05))
    return PreferenceSet(encoded, PAIRS_PER_STEP, device), policy.to(device)


@functools.cache
def tokenized_pairs() -> tuple[PreTrainedTokenizerBase, list[TokenIds]]:
    pairs = docstring_pairs(seed=0)[:400]
    tokenizer = train_tokenizer(pairs)
    return tokenizer, encode_pairs(pairs, tokenizer, max_length=128)[0]


@contextmanager
def process_group(engine: str) -> Iterator[torch.device]:
    """Joins the ranks that torchrun started, if any, and leaves them again; the device of this one."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else None
    if engine == "none":
        yield device or torch.device("cpu")
        return
    if "RANK" not in os.environ:
        raise SystemExit(f"--engine {engine} takes several ranks: torchrun --nproc_per_node 2 {__file__} ...")
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device else "gloo")
    try:
        if PAIRS_PER_STEP % dist.get_world_size():
            raise SystemExit(f"the {PAIRS_PER_STEP} pairs of a step must divide by the number of ranks")
        yield device or torch.device("cpu")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
