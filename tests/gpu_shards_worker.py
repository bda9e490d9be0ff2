"""A head split by vocabulary over two processes of one GPU; started by `test_gpu`.

python -m torch.distributed.run --standalone --nproc_per_node=2 tests/gpu_shards_worker.py cuda triton
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from tolerance import relative_error

from focalkern import FusedFocalPOLoss, VocabShard

PAIRS, LENGTH, HIDDEN, VOCAB = 2, 200, 256, 20000
SPLIT = 13000  # rows of the first rank, within a vocabulary block
SHARE = 1.25  # of the error of one process, which sums in another order


def make_batch(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator)
    labels = torch.randint(VOCAB, (2 * PAIRS, LENGTH), generator=generator)
    hidden = 1.2 * torch.nn.functional.normalize(weight[labels], dim=-1)
    hidden += 0.02 * torch.randn(hidden.shape, generator=generator)
    labels[:, : LENGTH // 3] = -100
    logps = torch.full((PAIRS,), -3.0 * LENGTH)
    refs = {"ref_chosen_logps": logps.to(device), "ref_rejected_logps": (logps - 1).to(device)}
    return hidden.to(device), weight.to(device), labels.to(device), refs


def gradients(
    dtype: torch.dtype, backend: str, backward: str, rows: slice, device: str, shard: VocabShard | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight, labels, refs = make_batch(device)
    # The values of bf16, whatever the dtype that is computed in.
    hidden = hidden.bfloat16().to(dtype).requires_grad_()
    weight = weight[rows].bfloat16().to(dtype).requires_grad_()
    loss_fn = FusedFocalPOLoss(backend=backend, backward=backward)
    out = loss_fn(hidden, weight, labels, vocab_shard=shard, **refs)
    out.loss.backward()
    assert backward == "exact" or out.kept_share < 0.4
    return out.loss.detach(), hidden.grad, weight.grad


def main(device: str, backend: str) -> None:
    dist.init_process_group("gloo")
    own = slice(0, SPLIT) if dist.get_rank() == 0 else slice(SPLIT, VOCAB)
    shard = VocabShard(dist.group.WORLD, own.start, VOCAB)
    everything = slice(0, VOCAB)
    exact = gradients(torch.float64, "torch", "exact", everything, device, None)
    for backward in ("exact", "certified"):
        one = gradients(torch.bfloat16, backend, backward, everything, device, None)
        parts = gradients(torch.bfloat16, backend, backward, own, device, shard)
        for name, actual, whole, truth in (
            ("loss", parts[0], one[0], exact[0]),
            ("dhidden", parts[1], one[1], exact[1]),
            ("dweight", parts[2], one[2][own], exact[2][own]),
        ):
            error, allowed = relative_error(actual, truth), relative_error(whole, truth)
            assert error <= SHARE * allowed + 1e-6, f"{backward} {name}: {error:.2e}, one has {allowed:.2e}"
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
