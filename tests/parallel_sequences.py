"""Checks of ranks that each hold a slice of the tokens of the same pairs, or pairs of their own."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from parallel_common import (
    BACKEND,
    EXACT,
    IGNORED,
    LENGTHS,
    PAIRS,
    PROMPT,
    TAU,
    Batch,
    H,
    T,
    V,
    agree,
    agree_in_fields,
    alone,
    check_of,
    in_float64,
    leaf,
    make_batch,
    make_loss,
    raised_on_ranks,
    same_on_ranks,
)
from tolerance import relative_error

from focalkern import FusedFocalPOLoss, FusedPairLoss, LinearLogps, VocabShard, linear_logps
from focalkern.methods import hinge

SEQUENCES, DATA, GRID = "sequences", "data", "vocabulary and sequences"
SPLIT = 600


# ----------------------------------------------------------------------------------------------------- slices


# Columns of padded sequences that each of two ranks has.
COLUMNS = {
    "uneven": ([*range(15)], [*range(15, T)]),  # the shorter sequences are wholly on the first rank
    "zigzag": ([*range(6), *range(18, T)], [*range(6, 18)]),
    "one rank has none": ([*range(T)], []),
    "one rank has the prompts": ([*range(PROMPT)], [*range(PROMPT, T)]),
}
# Tokens of each packed sequence that the first rank has; none, and all, among them.
CUTS = (10, 0, 17, 5, 24, 2)


def slice_of(batch: Batch, cut: str, rank: int) -> tuple[Batch, torch.Tensor]:
    """A rank's slice, and where it is in the flattened tokens."""
    position = torch.arange(batch.labels.numel()).view(batch.labels.shape)
    if batch.cu_seqlens is None:
        position = position[:, COLUMNS[cut][rank]]
        part = {"hidden": batch.hidden[:, COLUMNS[cut][rank]], "labels": batch.labels[:, COLUMNS[cut][rank]]}
        return replace(batch, **part), position.flatten()
    pieces = [x[:cut] if rank == 0 else x[cut:] for x, cut in zip(position.split(LENGTHS), CUTS, strict=True)]
    position = torch.cat(pieces)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(len(piece) for piece in pieces)])
    part = {"hidden": batch.hidden[position], "labels": batch.labels[position], "cu_seqlens": cu_seqlens}
    return replace(batch, **part), position


def run_pairs(loss_fn, batch: Batch, **arguments):
    """(output, gradients) of this rank."""
    leaves = {"hidden": leaf(batch.hidden), "weight": leaf(batch.weight), "bias": leaf(batch.bias)}
    out = loss_fn(**leaves, labels=batch.labels, **batch.references, cu_seqlens=batch.cu_seqlens, **arguments)
    out.loss.sum().backward()
    return out, {name: x.grad for name, x in leaves.items()}


def summed(gradient: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    total = gradient.clone()
    dist.all_reduce(total, group=group)
    return total


SLICED = {
    "FocalPO": {"kind": "FocalPO"},
    "FocalPO, exact": {"kind": "FocalPO", "backward": "exact"},
    "FocalPO, zigzag": {"kind": "FocalPO", "cut": "zigzag"},
    "FocalPO, one rank has none": {"kind": "FocalPO", "cut": "one rank has none"},
    "FocalPO, one rank has the prompts": {"kind": "FocalPO", "cut": "one rank has the prompts"},
    "FocalPO, packed": {"kind": "FocalPO", "packed": True, "reduction": "sum"},
    "FocalPO, packed, exact": {"kind": "FocalPO", "packed": True, "backward": "exact"},
    "SimPO": {"kind": "SimPO"},
    "SimPO, packed": {"kind": "SimPO", "packed": True, "reduction": "none"},
    "α-DPO": {"kind": "α-DPO"},
    "α-DPO, zigzag": {"kind": "α-DPO", "cut": "zigzag"},
    "α-DPO, packed": {"kind": "α-DPO", "packed": True},
    "pair loss": {"kind": "pair loss", "cut": "zigzag"},
    "pair loss with entropies": {"kind": "pair loss with entropies"},
    "pair loss with entropies, packed": {"kind": "pair loss with entropies", "packed": True},
}
PER_TOKEN = ("dropped_mass", "kept_share")


@check_of(SEQUENCES, SLICED)
def losses_and_gradients_of_slices(kind: str, packed: bool = False, cut: str = "uneven", **options) -> None:
    loss_fn, one_process = make_loss(kind, **options), make_loss(kind, alone(), **options)
    one_in_float64 = make_loss(kind, alone(), **options)
    for seed in (0, 1) if kind == "α-DPO" else (0,):
        batch = make_batch(packed, seed=seed)
        part, position = slice_of(batch, cut, dist.get_rank())
        out, gradients = run_pairs(loss_fn, part, sequence_group=dist.group.WORLD)
        expected, expected_gradients = run_pairs(one_process, batch)
        _, exact = run_pairs(one_in_float64, in_float64(batch))

        agree_in_fields(out, expected, *PER_TOKEN)
        assert expected_gradients["hidden"].abs().max() > 0
        whole = (x["hidden"].view(-1, H)[position] for x in (expected_gradients, exact))
        agree("dhidden", gradients["hidden"].view(-1, H), *whole)
        for name in ("weight", "bias"):
            agree(f"d{name}", summed(gradients[name]), expected_gradients[name], exact[name])
        same_on_ranks(loss=out.loss, losses=out.losses, prob=out.prob, lengths=out.lengths)
    if kind == "α-DPO":
        statistics = one_process.margin_statistics.state_dict()
        assert statistics["std"] > 0
        for name, value in loss_fn.margin_statistics.state_dict().items():
            agree(name, value, statistics[name])


@check_of(SEQUENCES, {"padded": {}, "packed": {"packed": True}})
def reference_and_given_log_probs_of_slices(packed: bool = False) -> None:
    batch = make_batch(packed)
    part, _ = slice_of(batch, "zigzag", dist.get_rank())
    group = {"sequence_group": dist.group.WORLD}
    loss_fn, one_process = make_loss("α-DPO"), make_loss("α-DPO", alone())
    refs = loss_fn.reference_logps(part.hidden, part.weight, part.labels, cu_seqlens=part.cu_seqlens, **group)
    expected_refs = one_process.reference_logps(
        batch.hidden, batch.weight, batch.labels, cu_seqlens=batch.cu_seqlens
    )
    for actual, expected in zip(refs, expected_refs, strict=True):
        agree("reference_logps", actual, expected)

    outs = []
    for function, tokens_of, arguments in ((loss_fn, part, group), (one_process, batch, {})):
        weight = leaf(batch.weight)
        tokens = linear_logps(tokens_of.hidden, weight, tokens_of.labels, tau=TAU, backend=BACKEND)
        layout = {"cu_seqlens": tokens_of.cu_seqlens}
        out = function.from_logps(tokens, tokens_of.labels, **batch.references, **layout, **arguments)
        out.loss.backward()
        outs.append((out, weight.grad))
    (out, dweight), (expected_out, expected_dweight) = outs
    agree_in_fields(out, expected_out, *PER_TOKEN)
    agree("dweight", summed(dweight), expected_dweight)


@check_of(SEQUENCES, {"padded": {}, "packed": {"packed": True}})
def a_completion_that_only_one_rank_has(packed: bool = False) -> None:
    """Length normalisation divides by the tokens of all ranks."""
    batch = make_batch(packed)
    part, _ = slice_of(batch, "uneven", dist.get_rank())
    sequence_of = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    if packed and dist.get_rank() == 0:
        assert part.cu_seqlens[1] == part.cu_seqlens[2], "the second sequence has no token here"
    out, _ = run_pairs(make_loss("SimPO"), part, sequence_group=dist.group.WORLD)
    assert out.loss.isfinite()

    labels = batch.labels.clone()
    labels[sequence_of == 1 if packed else 1] = IGNORED
    part, _ = slice_of(replace(batch, labels=labels), "uneven", dist.get_rank())
    none_left = r"^labels must leave at least one completion token.*got none in sequences \[1\]"
    call = partial(run_pairs, make_loss("SimPO"), part, sequence_group=dist.group.WORLD)
    raised_on_ranks(ValueError, none_left, call)
    out, _ = run_pairs(make_loss("FocalPO"), part, sequence_group=dist.group.WORLD)
    assert out.lengths[1] == 0
    assert out.chosen_logps[1] == 0


@check_of(SEQUENCES)
def mistakes_with_slices_are_raised_on_every_rank() -> None:
    batch, rank = make_batch(), dist.get_rank()
    part, _ = slice_of(batch, "uneven", rank)
    group = {"sequence_group": dist.group.WORLD}
    raised_on_ranks(
        ValueError,
        "^shift must not be given with sequence_group",
        partial(run_pairs, make_loss("FocalPO"), part, shift=True, **group),
    )
    raised_on_ranks(
        ValueError,
        "^ld_alpha must not be given with sequence_group",
        partial(run_pairs, FusedPairLoss(hinge, ld_alpha=0.5), part, **group),
    )
    raised_on_ranks(
        TypeError,
        r"^sequence_group must be a torch\.distributed process group; got int",
        partial(run_pairs, make_loss("FocalPO"), part, sequence_group=0),
    )
    fewer = pairs_of(part, [0, 1, 2][: 3 - rank])
    raised_on_ranks(
        ValueError,
        rf"^labels must be slices of the same pairs.*\[{2 * PAIRS}, {2 * PAIRS - 2}\]",
        partial(run_pairs, make_loss("FocalPO"), fewer, **group),
    )
    # Ranks that share a head have the same tokens, and no slices.
    shard = {"vocab_shard": VocabShard(dist.group.WORLD, 0, V)}
    shared = "^sequence_group must not share ranks with the group that the head is split over"
    call = partial(make_loss("FocalPO"), part.hidden, part.weight, part.labels, **part.references)
    raised_on_ranks(ValueError, shared, lambda: call(**shard, **group))
    tokens = LinearLogps(torch.zeros(part.labels.shape), vocab_group=dist.group.WORLD)
    given = partial(make_loss("FocalPO").from_logps, tokens, part.labels, **part.references)
    raised_on_ranks(ValueError, shared, lambda: given(**group))
    same_on_ranks(loss=run_pairs(make_loss("FocalPO"), part, **group)[0].loss)


@check_of(SEQUENCES)
def kl_of_slices_is_summed_like_log_probs() -> None:
    batch, rank = make_batch(), dist.get_rank()
    part, _ = slice_of(batch, "uneven", rank)
    loss_fn = FusedFocalPOLoss.alpha_dpo(implicit_reference="sequence_kl", normalize_margin=False)
    kl = torch.rand(2, 2 * PAIRS, generator=torch.Generator().manual_seed(0))  # of each rank's tokens

    def run(batch: Batch, kl: torch.Tensor, **group) -> torch.Tensor:
        chosen, rejected = kl.chunk(2)
        kls = {"chosen_kl": chosen, "rejected_kl": rejected}
        return loss_fn(batch.hidden, batch.weight, batch.labels, **batch.references, **kls, **group).losses

    expected = run(batch, kl.sum(0))
    assert not torch.allclose(expected, run(batch, kl[rank])), "the KL does not matter"
    losses = run(part, kl[rank], sequence_group=dist.group.WORLD)
    assert relative_error(losses, expected) <= EXACT


# ---------------------------------------------------------------------------------------- pairs of each rank


def pairs_of(batch: Batch, pairs: list[int]) -> Batch:
    """Some of the pairs of a padded batch."""
    rows = [*pairs, *(len(batch.labels) // 2 + i for i in pairs)]
    return replace(batch, hidden=batch.hidden[rows], labels=batch.labels[rows], ref=batch.ref[rows])


def as_packed(batch: Batch) -> Batch:
    """The same tokens, one sequence after the other; of no pairs, `cu_seqlens` is [0]."""
    lengths = [T] * len(batch.labels)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    return replace(
        batch, hidden=batch.hidden.flatten(0, 1), labels=batch.labels.flatten(), cu_seqlens=cu_seqlens
    )


SHARES = {
    "two pairs and one": [[0, 1], [2]],
    "a rank has none": [[0, 1, 2], []],
    "a rank's are all masked": [[0, 1], [2]],
}
KINDS = ("FocalPO", "α-DPO", "pair loss with entropies")
HOW = (("padded", "certified", "sum"), ("packed", "certified", "mean"), ("packed", "exact", "none"))


@check_of(
    DATA,
    {
        f"{share}, {kind}, {', '.join(how)}": {"share": share, "kind": kind, "how": how}
        for share in SHARES
        for kind in KINDS
        for how in HOW
    },
)
def ranks_with_pairs_of_their_own(share: str, kind: str, how: tuple[str, str, str]) -> None:
    """Data parallelism: what the ranks have adds up to one big batch, the statistics of α-DPO are its."""
    rank, (layout, backward, reduction) = dist.get_rank(), how
    options: dict[str, Any] = {"backward": backward, "reduction": reduction}
    if kind == "α-DPO":  # which divides by the length
        options["length_normalize"] = False
    loss_fn = make_loss(kind, **options)
    one_process = make_loss(kind, alone(), **options | {"reduction": "sum"})
    for seed in (0, 1):
        whole = make_batch(seed=seed)
        if share == "a rank's are all masked":
            labels = whole.labels.clone()
            labels[[2, 5]] = IGNORED
            whole = replace(whole, labels=labels)
        batch = pairs_of(whole, SHARES[share][rank])
        if layout == "packed":
            batch = as_packed(batch)
        out, gradients = run_pairs(loss_fn, batch)
        expected, expected_gradients = run_pairs(one_process, whole)

        pairs = SHARES[share][rank]
        assert out.losses.shape == (len(pairs),)
        agree("losses", out.losses, expected.losses[pairs])
        if not pairs:
            assert out.loss.sum() == 0
            assert all((x == 0).all() for x in gradients.values()), "a gradient of no pairs"
        if kind == "α-DPO":
            agree("adaptive_margin", out.adaptive_margin, expected.adaptive_margin[pairs])
        factor = max(len(pairs), 1) if reduction == "mean" else 1
        for name in ("weight", "bias"):
            assert gradients[name].isfinite().all()
            agree(f"d{name}", summed(factor * gradients[name]), expected_gradients[name])
        rows = [*pairs, *(PAIRS + i for i in pairs)]
        dhidden = expected_gradients["hidden"][rows]
        agree("dhidden", factor * gradients["hidden"].view_as(dhidden), dhidden)
    if kind == "α-DPO":
        statistics = one_process.margin_statistics.state_dict()
        assert statistics["std"] > 0
        for name, value in loss_fn.margin_statistics.state_dict().items():
            agree(name, value, statistics[name])


@check_of(DATA)
def no_rank_has_pairs() -> None:
    loss_fn = make_loss("α-DPO")
    out, gradients = run_pairs(loss_fn, pairs_of(make_batch(), []))
    assert out.loss == 0
    assert all((x == 0).all() for x in gradients.values())
    assert all(value == 0 for value in loss_fn.margin_statistics.state_dict().values())
    assert out.certificate().kept_share == 1.0


# ------------------------------------------------------------------------------- four ranks, two by two


def grid_groups() -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Ranks 0 and 1 hold a head together, 2 and 3 another copy; 0 and 2 (1 and 3) the same rows of it."""
    rows = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    columns = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    return rows[dist.get_rank() // 2], columns[dist.get_rank() % 2]


@check_of(
    GRID,
    {
        "slices, padded": {"is_sliced": True},
        "slices, packed": {"is_sliced": True, "packed": True},
        "slices, exact": {"is_sliced": True, "backward": "exact"},
        "pairs of their own": {"is_sliced": False},
        "pairs of their own, statistics of the columns": {"is_sliced": False, "by_columns": True},
    },
)
def heads_split_by_vocabulary(
    is_sliced: bool, packed: bool = False, by_columns: bool = False, **options: Any
) -> None:
    vocab_group, other_group = grid_groups()
    column, row = dist.get_rank() % 2, dist.get_rank() // 2
    rows = slice(0, SPLIT) if column == 0 else slice(SPLIT, V)
    loss_fn = make_loss("α-DPO", other_group if by_columns else None, reduction="sum", **options)
    one_process = make_loss("α-DPO", alone(), reduction="sum", **options)
    for seed in (0, 1):
        whole = make_batch(packed, seed=seed)
        if is_sliced:
            batch, position = slice_of(whole, "zigzag", row)
        else:
            pairs = [[0, 1], [2]][row]
            batch = pairs_of(whole, pairs)
            position = torch.arange(2 * PAIRS * T).view(2 * PAIRS, T)[[*pairs, *(PAIRS + i for i in pairs)]]
            position = position.flatten()
        batch = replace(batch, weight=batch.weight[rows], bias=batch.bias[rows])
        arguments = {"vocab_shard": VocabShard(vocab_group, rows.start, V)}
        if is_sliced:
            arguments["sequence_group"] = other_group
        out, gradients = run_pairs(loss_fn, batch, **arguments)
        expected, expected_gradients = run_pairs(one_process, whole)
        if is_sliced:
            agree_in_fields(out, expected, *PER_TOKEN)
        else:
            agree("adaptive_margin", out.adaptive_margin, expected.adaptive_margin[pairs])
            agree("losses", out.losses, expected.losses[pairs])
        _, exact = run_pairs(one_process.eval(), in_float64(whole))
        one_process.train()
        dhidden, exact_dhidden = (x["hidden"].view(-1, H)[position] for x in (expected_gradients, exact))
        agree("dhidden", gradients["hidden"].reshape(-1, H), dhidden, exact_dhidden)
        for name in ("weight", "bias"):
            gradient = summed(gradients[name], other_group)
            agree(f"d{name}", gradient, expected_gradients[name][rows], exact[name][rows])
