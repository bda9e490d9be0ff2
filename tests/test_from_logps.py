"""`from_logps` of the losses: the same loss from what `linear_logps` returned, in every layout."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from problems import batch

from focalkern import FusedFocalPOLoss, FusedPairLoss, LowRankUpdate, linear_logps, methods

LOSSES = {
    "FocalPO": lambda: FusedFocalPOLoss(gamma=0.5, margin=0.3),
    "SimPO": lambda: FusedFocalPOLoss.simpo(),
    "α-DPO": lambda: FusedFocalPOLoss.alpha_dpo(beta=1.0, alpha=0.5),
    "IPO": lambda: FusedPairLoss(methods.ipo),
    "WPO": lambda: FusedPairLoss(methods.with_wpo_weights(methods.dpo), outputs=("log_sum_sq_probs",)),
    "LD-DPO": lambda: FusedPairLoss(methods.dpo, ld_alpha=0.5),
}


@pytest.mark.parametrize(("layout", "shift"), [("padded", False), ("padded", True), ("packed", True)])
@pytest.mark.parametrize("loss", LOSSES)
def test_it_is_the_loss_on_the_head(loss, layout, shift, backend):
    pairs, found = batch((4, 3, 5, 3, 5, 4)), []
    for from_logps in (False, True):
        loss_fn, leaves = LOSSES[loss](), pairs.leaves()
        inputs = pairs.in_layout(layout, leaves) | {"shift": shift}
        if from_logps:
            tokens = linear_logps(**inputs, outputs=getattr(loss_fn, "outputs", ()), backend=backend)
            given = {name: x for name, x in inputs.items() if name not in leaves}
            out = loss_fn.from_logps(tokens, **given, **pairs.refs)
        else:
            loss_fn.backend = backend
            out = pairs.loss(loss_fn, inputs)
        out.loss.backward()
        gradients = (x.grad for x in leaves.values())
        found.append([out.losses, out.chosen_rewards, out.prob, out.lengths, *gradients])
    for direct, by_logps in zip(*found, strict=True):
        torch.testing.assert_close(by_logps, direct, rtol=1e-5, atol=1e-6)
    assert found[0][-1].any()


def test_several_losses_share_one_head(backend):
    pairs = batch()
    focal, sft = FusedFocalPOLoss(), FusedPairLoss(methods.sft)
    leaves = [pairs.leaves() for _ in range(2)]
    tokens = linear_logps(**leaves[0], labels=pairs.labels, backend=backend)
    loss = focal.from_logps(tokens, pairs.labels, **pairs.refs).loss
    (loss + 0.3 * sft.from_logps(tokens, pairs.labels).loss).backward()
    apart = focal(**leaves[1], labels=pairs.labels, **pairs.refs).loss
    (apart + 0.3 * sft(**leaves[1], labels=pairs.labels).loss).backward()
    for shared, own in zip(leaves[0].values(), leaves[1].values(), strict=True):
        torch.testing.assert_close(shared.grad, own.grad, rtol=1e-5, atol=1e-7)


def test_what_the_backward_left_out_is_told_by_either_output():
    pairs = batch()
    tokens = linear_logps(pairs.hidden.clone().requires_grad_(), pairs.weight, pairs.labels, tau=1e-3)
    out = FusedFocalPOLoss().from_logps(tokens, pairs.labels, **pairs.refs)
    out.loss.backward()
    assert out.kept_share is tokens.kept_share
    assert out.kept_share.isfinite()
    assert out.certificate() == tokens.certificate()


@pytest.mark.parametrize(
    "make", [FusedFocalPOLoss, lambda: FusedPairLoss(methods.dpo)], ids=["focal", "pair"]
)
def test_the_losses_take_a_low_rank_update(make, backend):
    """As a head with the update merged into its weight; `reference_logps` too."""
    pairs = batch()
    a, b = torch.randn(3, 16).to(pairs.hidden) / 4, torch.randn(150, 3).to(pairs.hidden)
    update = LowRankUpdate.lora(pairs.hidden, a, b, scaling=0.5)
    merged = pairs.weight + 0.5 * b @ a
    loss_fn = make()
    loss_fn.backend = backend
    out = loss_fn(pairs.hidden, pairs.weight, pairs.labels, **pairs.refs, update=update)
    expected = loss_fn(pairs.hidden, merged, pairs.labels, **pairs.refs)
    torch.testing.assert_close(out.losses, expected.losses, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(
        out.losses, loss_fn(pairs.hidden, pairs.weight, pairs.labels, **pairs.refs).losses
    )
    refs = loss_fn.reference_logps(pairs.hidden, pairs.weight, pairs.labels, update=update)
    torch.testing.assert_close(torch.cat(refs), torch.cat([out.chosen_logps, out.rejected_logps]))


def test_packed_linear_logps_keep_sequences_apart(backend):
    """Each as if it were alone; the last position of each, and an empty sequence, give nothing."""
    pairs = batch()
    packed = pairs.in_layout("packed")
    hidden, labels = packed["hidden"], packed["labels"]
    cu_seqlens = torch.tensor([0, 4, 4, 9, len(labels)], device=DEVICE)
    found = linear_logps(
        hidden, pairs.weight, labels, shift=True, cu_seqlens=cu_seqlens, backend=backend
    ).logps
    expected = torch.zeros_like(found)
    for start, end in ((0, 4), (4, 9), (9, len(labels))):
        alone = linear_logps(hidden[start:end], pairs.weight, labels[start:end], shift=True, backend=backend)
        expected[start : end - 1] = alone.logps
    torch.testing.assert_close(found, expected)
    assert (found[[3, 8, -1]] == 0).all()


@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        ({"token_logps": torch.zeros(6, 5)}, TypeError, "token_logps must be what linear_logps returns"),
        (
            {"shift": True},
            ValueError,
            r"token_logps must be of these labels .* \[6, 4\] on cpu; got \[6, 5\]",
        ),
        ({"labels": torch.zeros(5, 5, dtype=torch.int64)}, ValueError, "labels must hold an even number"),
        ({"labels": torch.zeros(6, 5)}, TypeError, "labels must be int64 or int32"),
        ({"cu_seqlens": torch.tensor([0, 1, 30])}, ValueError, r"labels must be \[N\] when cu_seqlens"),
        ({"ref_chosen_logps": None}, ValueError, "ref_chosen_logps must be given"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, exception, message):
    pairs = batch()
    tokens = linear_logps(pairs.hidden, pairs.weight, pairs.labels)
    given = {"token_logps": tokens, "labels": pairs.labels, **pairs.refs, **arguments}
    with pytest.raises(exception, match=message):
        FusedFocalPOLoss().from_logps(**given)


def test_an_output_that_the_head_was_not_asked_for_is_named():
    pairs = batch()
    tokens = linear_logps(pairs.hidden, pairs.weight, pairs.labels)
    with pytest.raises(ValueError, match=r"token_logps must have 'entropy': linear_logps\(..., outputs="):
        FusedPairLoss(methods.dpo, outputs=("entropy",)).from_logps(tokens, pairs.labels, **pairs.refs)
