"""Checks of a head that two ranks hold together, each some rows of it, against one process with all of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from parallel_common import (
    BACKEND,
    EXACT,
    IGNORED,
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
    normal,
    raised_on_ranks,
    recorded,
    same_on_ranks,
)
from tolerance import relative_error
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import focalkern.logps.function
import focalkern.products
from focalkern import (
    LowRankUpdate,
    VocabShard,
    linear_kl,
    linear_logps,
    reference,
)
from focalkern.logps import torch_form
from focalkern.records import OUTPUTS

SPLIT = 600  # rows of the first rank: not the middle, and within a vocabulary block
TORCH, TRITON = "vocabulary, torch", "vocabulary, triton"


def own_rows() -> slice:
    return slice(0, SPLIT) if dist.get_rank() == 0 else slice(SPLIT, V)


def shard() -> VocabShard:
    return VocabShard(dist.group.WORLD, start=own_rows().start, vocab_size=V)


def form_of_backend():
    if BACKEND == "torch":
        return torch_form
    from focalkern.logps import triton_form

    return triton_form


def low_rank_update(batch: Batch) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "update.hidden": normal(generator, *batch.labels.shape, 4),
        "update.weight": 0.3 * normal(generator, V, 4),
    }
    return {name: x.to(batch.weight.dtype) for name, x in tensors.items()}


def head_leaves(batch: Batch, is_sharded: bool, *names: str) -> dict[str, torch.Tensor]:
    """Those of the whole head, or those of this rank."""
    values = {"hidden": batch.hidden, "weight": batch.weight, "bias": batch.bias, **low_rank_update(batch)}
    rows = own_rows() if is_sharded else slice(None)
    return {name: leaf(values[name][rows] if "hidden" not in name else values[name]) for name in names}


def own_part(gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What this rank is to have of the gradients of the whole head."""
    return {name: x if "hidden" in name else x[own_rows()] for name, x in gradients.items()}


def head_arguments(leaves: Mapping[str, torch.Tensor], is_sharded: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {"vocab_shard": shard() if is_sharded else None}
    if "bias" in leaves:
        arguments["bias"] = leaves["bias"]
    if "update.hidden" in leaves:
        arguments["update"] = LowRankUpdate(leaves["update.hidden"], leaves["update.weight"])
    return arguments


def cotangent(batch: Batch, shift: bool) -> torch.Tensor:
    """dloss/dlogps, of some tokens 0."""
    shape = [*batch.labels.shape[:-1], batch.labels.shape[-1] - (shift and batch.cu_seqlens is None)]
    g = normal(torch.Generator().manual_seed(2), *shape)
    g[..., 1::5] = 0.0
    return g.float()


def run_linear(
    batch: Batch,
    is_sharded: bool,
    extras: tuple[str, ...] = (),
    through: tuple[str, ...] = ("logps",),
    **options,
):
    """(result, gradients) of `linear_logps`, of the whole head or of this rank's part of it."""
    leaves = head_leaves(batch, is_sharded, "hidden", "weight", *extras)
    options = {"tau": TAU, "backend": BACKEND, "outputs": OUTPUTS, "cu_seqlens": batch.cu_seqlens} | options
    result = linear_logps(
        leaves["hidden"],
        leaves["weight"],
        batch.labels,
        **head_arguments(leaves, is_sharded),
        **options,
    )
    g = cotangent(batch, options.get("shift", False))
    values = [getattr(result, name) for name in through]
    gradients = torch.autograd.grad(values, list(leaves.values()), [g, 0.5 * g.flip(-1)][: len(values)])
    return result, dict(zip(leaves, gradients, strict=True))


LINEAR = {
    "certified": {"certified": True},
    "exact": {"backward": "exact"},
    "packed, certified": {"packed": True, "certified": True},
    "packed, shifted": {"packed": True, "shift": True, "certified": True},
    "shifted": {"shift": True, "certified": True},
    "through the entropy": {"through": ("logps", "entropy")},
    "through the entropy alone": {"through": ("entropy",), "extras": ("bias",)},
    "softcap": {"softcap": 40.0, "extras": ("bias",), "certified": True},
    "softcap, exact": {"softcap": 40.0, "backward": "exact"},
    "temperature and scale": {"temperature": 0.9, "logit_scale": 1.1, "certified": True},
    "bias": {"extras": ("bias",), "certified": True},
    "low-rank update": {"extras": ("bias", "update.hidden", "update.weight"), "certified": True},
    "low-rank update, exact": {"extras": ("update.hidden", "update.weight"), "backward": "exact"},
    "ignore_index within the vocabulary": {"ignore_index": 7, "certified": True},
    "tau of 0": {"tau": 0.0},
    "one sequence": {"one_sequence": True, "certified": True},
}


INTERPRETED = ("certified", "exact", "packed, shifted", "through the entropy", "low-rank update")


@check_of(TORCH, LINEAR)
@check_of(TRITON, {case: LINEAR[case] for case in INTERPRETED})
def log_probs_and_gradients(
    packed: bool = False, certified: bool = False, one_sequence: bool = False, **options
) -> None:
    batch = make_batch(packed)
    if "ignore_index" in options:
        labels = torch.where(batch.labels == options["ignore_index"], 8, batch.labels)
        batch = replace(batch, labels=torch.where(labels == IGNORED, options["ignore_index"], labels))
    if one_sequence:
        batch = replace(batch, hidden=batch.hidden[0], labels=batch.labels[0])
    with recorded((form_of_backend(), "certified_backward")) as backwards:
        result, gradients = run_linear(batch, True, **options)
    assert len(backwards) == certified, "the wrong kind of backward"
    expected, expected_gradients = run_linear(batch, False, **options)

    agree("logps", result.logps, expected.logps)
    for name in OUTPUTS:
        agree(name, getattr(result, name), getattr(expected, name))
    exact = {}
    if "through" in options:  # −p·(log p + entropy) cancels
        exact = own_part(run_linear(in_float64(batch), False, **options, backend="torch")[1])
    for name, gradient in own_part(expected_gradients).items():
        agree(f"d{name}", gradients[name], gradient, exact.get(name))
    # A row that is left out as negligible is not of the same size in every division into blocks.
    if not certified and options.get("backward") != "exact":
        agree("dropped_mass", result.dropped_mass, expected.dropped_mass)
        agree("kept_share", result.kept_share, expected.kept_share)
    if certified:
        assert result.kept_share < 0.4, f"kept {result.kept_share:.2f}: little is left out"
    outputs = {name: getattr(result, name) for name in OUTPUTS}
    same_on_ranks(logps=result.logps, dhidden=gradients["hidden"], **outputs)
    if result.dropped_mass is not None:
        same_on_ranks(dropped_mass=result.dropped_mass, kept_share=result.kept_share)


def plain_gradients(batch: Batch, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """With materialised logits: logps, dhidden, dweight of the whole head."""
    hidden, weight = leaf(batch.hidden.to(dtype)), leaf(batch.weight.to(dtype))
    logps = reference.linear_logps(hidden, weight, batch.labels)["logps"]
    gradients = torch.autograd.grad(logps, (hidden, weight), cotangent(batch, False).to(logps))
    return {"logps": logps, **own_part(dict(zip(("hidden", "weight"), gradients, strict=True)))}


@check_of(TORCH, {"bf16": {"dtype": torch.bfloat16}, "fp16": {"dtype": torch.float16}})
@check_of(TRITON, {"fp16": {"dtype": torch.float16}})
def low_precision(dtype: torch.dtype) -> None:
    """The sum over the ranks is one of fp32: it costs no accuracy that one process has."""
    batch = make_batch(dtype=dtype)
    exact = plain_gradients(batch, torch.float64)
    for options in ({"tau": "auto"}, {"backward": "exact"}):
        with recorded((dist, "all_reduce")) as calls:
            result, gradients = run_linear(batch, True, outputs=(), **options)
        assert all(arguments[0].dtype == torch.float32 for _, arguments in calls), "a sum in 16 bits"
        expected, expected_gradients = run_linear(batch, False, outputs=(), **options)
        agree("logps", result.logps, expected.logps)
        for name, gradient in own_part(expected_gradients).items():
            assert gradients[name].dtype == dtype
            error, error_alone = (relative_error(x[name], exact[name]) for x in (gradients, {name: gradient}))
            assert error <= 1.2 * error_alone, f"d{name}: error {error:.2e}, {error_alone:.2e} by one process"
        same_on_ranks(dhidden=gradients["hidden"])


# --------------------------------------------------------------------------------------------------- losses


def run_loss(loss_fn, batch: Batch, is_sharded: bool, **arguments):
    leaves = head_leaves(batch, is_sharded, "hidden", "weight", "bias")
    arguments = batch.references | {"cu_seqlens": batch.cu_seqlens} | arguments
    out = loss_fn(
        leaves["hidden"], leaves["weight"], batch.labels, **head_arguments(leaves, is_sharded), **arguments
    )
    out.loss.sum().backward()
    return out, {name: x.grad for name, x in leaves.items()}


LOSSES = {
    "FocalPO": {"kind": "FocalPO"},
    "FocalPO, exact": {"kind": "FocalPO", "backward": "exact"},
    "FocalPO, packed": {"kind": "FocalPO", "packed": True},
    "FocalPO, shifted": {"kind": "FocalPO", "shift": True},
    "DPO, losses of pairs": {"kind": "DPO", "reduction": "none"},
    "SimPO": {"kind": "SimPO"},
    "SimPO, packed and shifted": {"kind": "SimPO", "packed": True, "shift": True},
    "α-DPO": {"kind": "α-DPO"},
    "α-DPO, packed": {"kind": "α-DPO", "packed": True},
    "α-DPO with statistics of each rank": {"kind": "α-DPO", "own_statistics": True},
    "pair loss": {"kind": "pair loss"},
    "pair loss with entropies, packed": {"kind": "pair loss with entropies", "packed": True},
}


@check_of(TORCH, LOSSES)
@check_of(TRITON, {"α-DPO, packed": LOSSES["α-DPO, packed"]})
def losses_and_gradients(
    kind: str, packed: bool = False, shift: bool = False, own_statistics: bool = False, **options
) -> None:
    batch = make_batch(packed)
    # Two batches: the second is standardised by running statistics of both.
    for seed in (0, 1) if kind == "α-DPO" else (0,):
        batch = make_batch(packed, seed=seed)
        if seed == 0:
            loss_fn = make_loss(kind, alone() if own_statistics else None, **options)
            one_process = make_loss(kind, alone(), **options)
            one_in_float64 = make_loss(kind, alone(), **options | {"backend": "torch"})
        out, gradients = run_loss(loss_fn, batch, True, shift=shift)
        expected, expected_gradients = run_loss(one_process, batch, False, shift=shift)
        exact_out, exact = run_loss(one_in_float64, in_float64(batch), False, shift=shift)
        # Where u is 4, a loss is 0.01, and one ulp of the log-probs of a sequence is 1e-6 of it.
        agree_in_fields(out, expected, "dropped_mass", "kept_share", exact=exact_out)
        assert expected_gradients["hidden"].abs().max() > 0
        for name, gradient in own_part(expected_gradients).items():
            agree(f"d{name}", gradients[name], gradient, own_part(exact)[name])
        same_on_ranks(loss=out.loss, losses=out.losses, logps=out.chosen_logps, dhidden=gradients["hidden"])
    if kind == "α-DPO":
        statistics = one_process.margin_statistics.state_dict()
        assert statistics["std"] > 0
        for name, value in loss_fn.margin_statistics.state_dict().items():
            agree(name, value, statistics[name])


@check_of(TORCH, {"no pair": {"pairs": 0}, "pairs without a token": {"pairs": PAIRS}})
@check_of(TRITON, {"no pair": {"pairs": 0}, "pairs without a token": {"pairs": PAIRS}})
def batches_without_a_token(pairs: int) -> None:
    batch = make_batch()
    rows = [*range(pairs), *range(PAIRS, PAIRS + pairs)]
    labels = torch.full_like(batch.labels, IGNORED)[rows]
    batch = replace(batch, hidden=batch.hidden[rows], labels=labels, ref=batch.ref[rows])
    for kind in ("FocalPO", "pair loss with entropies"):
        for backward in ("certified", "exact"):
            out, gradients = run_loss(make_loss(kind, backward=backward), batch, True)
            assert out.loss.isfinite()
            assert (out.chosen_logps == 0).all()
            assert all((x == 0).all() for x in gradients.values())
            assert out.certificate().kept_share == 1.0


@check_of(TORCH, {"padded": {}, "packed": {"packed": True}})
def reference_log_probs_and_losses_from_log_probs(packed: bool = False) -> None:
    batch = make_batch(packed)
    hidden, weight = batch.hidden, batch.weight[own_rows()]
    loss_fn, one_process = make_loss("α-DPO"), make_loss("α-DPO", alone())
    layout = {"cu_seqlens": batch.cu_seqlens}
    refs = loss_fn.reference_logps(hidden, weight, batch.labels, vocab_shard=shard(), **layout)
    expected_refs = one_process.reference_logps(hidden, batch.weight, batch.labels, **layout)
    for actual, expected in zip(refs, expected_refs, strict=True):
        agree("reference_logps", actual, expected)

    outs = []
    for function, is_sharded in ((loss_fn, True), (one_process, False)):
        leaves = head_leaves(batch, is_sharded, "hidden", "weight")
        tokens = linear_logps(
            leaves["hidden"],
            leaves["weight"],
            batch.labels,
            tau=TAU,
            backend=BACKEND,
            **head_arguments(leaves, is_sharded),
            **layout,
        )
        out = function.from_logps(tokens, batch.labels, **batch.references, **layout)
        gradients = torch.autograd.grad(out.loss, list(leaves.values()))
        outs.append((out, dict(zip(leaves, gradients, strict=True))))
    (out, gradients), (expected_out, expected_gradients) = outs
    agree_in_fields(out, expected_out, "dropped_mass", "kept_share")
    for name, gradient in own_part(expected_gradients).items():
        agree(f"d{name}", gradients[name], gradient)


# ----------------------------------------------------------------------------------------- what is left out


def spread_out(batch: Batch) -> Batch:
    """Less sure of a topic: what is left out shows."""
    return replace(batch, hidden=0.5 * batch.hidden)


def kept_everywhere(events: list) -> torch.Tensor:  # [n, V] bool
    """Which logits the backwards of all ranks computed, as they recorded it."""
    (_, (keep, _)) = events[0]
    keep = keep.repeat_interleave(128, 1)
    own = torch.zeros(keep.shape[0], V, dtype=torch.int64)
    rows = own_rows()
    own[:, rows] = keep[:, : rows.stop - rows.start].long()
    dist.all_reduce(own)
    return own.bool()


@check_of(TORCH, {"padded": {}, "packed": {"packed": True}, "bias": {"extras": ("bias",)}})
@check_of(TRITON, {"padded": {}})
def what_is_left_out_is_what_is_told(packed: bool = False, extras: tuple[str, ...] = ()) -> None:
    batch = spread_out(make_batch(packed))
    options = {"tau": 2.0**-9, "extras": extras, "outputs": ()}
    with recorded((focalkern.logps.function, "list_pairs")) as events:
        result, gradients = run_linear(batch, True, **options)
    kept = kept_everywhere(events)

    is_live = batch.labels != IGNORED
    z = batch.hidden[is_live].double() @ batch.weight.double().T
    z = z + batch.bias.double() if extras else z
    g = cotangent(batch, False)[is_live].double()
    mass = torch.where(kept, 0.0, z.softmax(-1)).sum(-1)
    assert torch.equal(mass > 1 - 1e-9, g == 0), "nothing is computed for rows without a gradient"
    assert mass[g != 0].max() > 1e-4, "nothing is left out"
    told = result.dropped_mass[is_live].double()
    assert (told - mass).abs().max() < 1e-6, f"dropped_mass is off by {(told - mass).abs().max():.1e}"
    assert (result.dropped_mass[~is_live] == 0).all()

    counts = torch.tensor([events[0][1][1].total, events[0][1][1].possible])
    dist.all_reduce(counts)
    assert result.kept_share == counts[0] / counts[1], "kept_share is not that of all shards"
    certificate = result.certificate()
    norms = batch.weight.double().norm(dim=1)
    bound = (g.abs() * mass)[g != 0].max() * norms.max()
    assert abs(certificate.dhidden_bound / bound - 1) < 1e-3, "the bound is not that of the whole head"
    assert abs(certificate.max_dropped_mass - 1) < 1e-6
    assert abs(certificate.mean_dropped_mass / mass.mean() - 1) < 1e-4
    certificates: list[Any] = [None] * 2
    dist.all_gather_object(certificates, certificate)
    assert certificates[0] == certificates[1]

    exact = run_linear(
        in_float64(batch),
        False,
        **options | {"backward": "exact", "backend": "torch"},
    )[1]
    errors = (gradients["hidden"].double() - exact["hidden"]).norm(dim=-1)
    assert errors.max() > 1e-2 * bound, "an error of rounding: the bound is not put to the test"
    assert errors.max() <= certificate.dhidden_bound, "dhidden is further off than its bound"


FALLBACKS = {
    "no label there": {},
    "a few labels there": {"labels_there": 3},
    "a few labels there, shifted": {"labels_there": 3, "shift": True},
}


@check_of(TORCH, FALLBACKS)
@check_of(TRITON, FALLBACKS)
def one_rank_falls_back_to_the_exact_backward(labels_there: int = 0, shift: bool = False) -> None:
    """All blocks of the first rank have mass, next to none of the other's."""
    batch = make_batch()
    labels = torch.where(batch.labels == IGNORED, IGNORED, batch.labels % SPLIT)
    labels[0, PROMPT : PROMPT + labels_there] = SPLIT + 130 * torch.arange(labels_there)
    bias = torch.where(torch.arange(V) < SPLIT, 0.0, -25.0)
    batch = replace(batch, hidden=0.2 * batch.hidden, labels=labels, bias=bias)
    names = ("exact_backward", "certified_backward")
    options = {"extras": ("bias",), "shift": shift}
    with recorded(*((form_of_backend(), name) for name in names)) as backwards:
        result, gradients = run_linear(batch, True, **options)
    assert [name for name, _ in backwards] == [names[dist.get_rank()]]
    _, expected_gradients = run_linear(batch, False, backward="exact", **options)
    for name, gradient in own_part(expected_gradients).items():
        # The second rank's rows of dweight are next to nothing.
        error = (gradients[name] - gradient).norm() / expected_gradients[name].norm()
        assert error <= EXACT, f"d{name}: {error:.2e} relative to that of the whole head"

    labels = labels[:, 1:] if shift else labels
    is_live = labels != IGNORED
    g = cotangent(batch, shift)
    n, blocks = int(is_live.sum()), (-(-SPLIT // 128), -(-(V - SPLIT) // 128))
    kept = n * blocks[0] + int((g[labels >= SPLIT] != 0).sum())
    assert abs(result.kept_share - kept / (n * sum(blocks))) < 1e-6, "kept_share is not that of both ranks"
    # Of a row without a gradient all is left out by the one, nothing by the other: its share is what is told.
    told = result.dropped_mass[is_live & (g == 0)]
    assert torch.equal(told, torch.full_like(told, (V - SPLIT) / V))
    assert result.dropped_mass[is_live & (g != 0)].max() < 1e-6
    same_on_ranks(dropped_mass=result.dropped_mass, kept_share=result.kept_share)


# ---------------------------------------------------------------------------- which gradients, and how sent


@check_of(TORCH, {"certified": {}, "exact": {"backward": "exact"}})
@check_of(TRITON, {"certified": {}})
def frozen_weights_and_frozen_hidden_states(**options) -> None:
    batch = make_batch()
    rows, g = own_rows(), cotangent(batch, False)
    _, expected = run_linear(batch, False, outputs=(), **options)
    options = {"tau": TAU, "backend": BACKEND, **options}
    for trained in ("hidden", "weight"):
        leaves = {"hidden": batch.hidden, "weight": batch.weight[rows]}
        leaves[trained] = leaf(leaves[trained])
        out = linear_logps(leaves["hidden"], leaves["weight"], batch.labels, vocab_shard=shard(), **options)
        (gradient,) = torch.autograd.grad(out.logps, leaves[trained], g)
        agree(f"d{trained}", gradient, own_part(expected)[trained])
    with torch.no_grad():
        out = linear_logps(batch.hidden, batch.weight[rows], batch.labels, vocab_shard=shard(), **options)
    assert not out.logps.requires_grad
    agree("logps", out.logps, run_linear(batch, False, **options)[0].logps)


COLLECTIVES = (
    *("all_gather_single", "all_gather_into_tensor", "all_gather", "all_reduce", "reduce_scatter_tensor"),
    *("reduce_scatter_single", "broadcast", "all_to_all", "all_to_all_single", "barrier", "send", "recv"),
)


@check_of(TORCH, {"certified": {}, "exact": {"backward": "exact"}})
def what_is_sent(backward: str = "certified") -> None:
    """Forward: ten numbers that tell whether the ranks agree, in every call, then two for each row.
    Backward: dhidden, and what is left out of each row."""
    batch = make_batch(dtype=torch.bfloat16)
    n = int((batch.labels != IGNORED).sum())
    hidden, weight = leaf(batch.hidden), leaf(batch.weight[own_rows()])
    sent_by = [(dist, name) for name in COLLECTIVES]
    for _ in range(2):
        with recorded(*sent_by) as events:
            out = linear_logps(
                hidden,
                weight,
                batch.labels,
                vocab_shard=shard(),
                backward=backward,
                tau=2.0**-13,
                backend="torch",
            )
        gathers, of_rank = zip(*((name, arguments[1]) for name, arguments in events), strict=True)
        assert all(gather.startswith("all_gather_") for gather in gathers), gathers
        assert [list(x.shape) for x in of_rank] == [[10], [2, n]]
        assert [x.dtype for x in of_rank] == [torch.int64, torch.float32]

    with recorded(*sent_by, (focalkern.products, "product_over_rows")) as events:
        out.logps.backward(cotangent(batch, False))
    sent = [(name, list(x[0].shape), x[0].dtype) for name, x in events if name != "product_over_rows"]
    record = [("all_reduce", [n + 2], torch.float32)] if backward == "certified" else []
    assert sent == [*record, ("all_reduce", [n, H], torch.float32)], sent
    if backward == "exact":
        assert [name for name, _ in events][-2:] == ["all_reduce", "product_over_rows"], (
            "dhidden is under way while dweight is computed"
        )


@check_of(TRITON, {"certified": {}, "exact": {"backward": "exact"}})
def dhidden_is_sent_before_dweight_is_computed(backward: str = "certified") -> None:
    from focalkern.logps import triton_certified

    batch = make_batch()
    hidden, weight = leaf(batch.hidden), leaf(batch.weight[own_rows()])
    out = linear_logps(
        hidden, weight, batch.labels, vocab_shard=shard(), backward=backward, tau=TAU, backend="triton"
    )
    products = (
        (triton_certified._Step, "write_dweight"),
        (focalkern.products, "product_over_rows"),
    )
    with recorded((dist, "all_reduce"), *products) as events:
        out.logps.backward(cotangent(batch, False))
    last_two = [(name, list(x[0].shape) if name == "all_reduce" else None) for name, x in events[-2:]]
    n = int((batch.labels != IGNORED).sum())
    product = "write_dweight" if backward == "certified" else "product_over_rows"
    assert last_two == [("all_reduce", [n, H]), (product, None)], last_two


# ------------------------------------------------------------------------------------------------- mistakes


@check_of(TORCH)
def mistakes_are_raised_on_every_rank() -> None:
    batch, rank = make_batch(), dist.get_rank()

    def call(labels=batch.labels, hidden=batch.hidden, rows=None, start=None, vocab_size=V, **options):
        rows = own_rows() if rows is None else slice(*rows[rank])
        start = rows.start if start is None else start[rank]
        vocab_shard = VocabShard(dist.group.WORLD, start, vocab_size)
        weight = batch.weight[rows].to(hidden.dtype)
        return linear_logps(hidden, weight, labels, vocab_shard=vocab_shard, **options)

    def with_first(values):
        changed = batch.labels.clone()
        changed[0, PROMPT : PROMPT + 2] = values
        return changed

    labels, first = batch.labels, batch.labels[0, PROMPT : PROMPT + 2]
    n = int((labels != IGNORED).sum())
    inputs = "^hidden and labels must be the same on all ranks"
    shorter = rf"{inputs}.*\[\[{T}, {H}, {n}, .*\[{T - 1}, {H}, {n}, "
    raised_on_ranks(ValueError, shorter, lambda: call(labels[:, rank:], batch.hidden[:, rank:]))
    fewer = rf"{inputs}.*\[\[{T}, {H}, {n}, .*\[{T}, {H}, {n - 2}, "
    none = torch.full_like(first, IGNORED)
    raised_on_ranks(ValueError, fewer, lambda: call(with_first(none if rank else first)))
    # All kinds of other labels are in test_distributed.
    raised_on_ranks(ValueError, inputs, lambda: call(with_first(first + rank)))
    outside = rf"^labels must be in \[0, {V}\) or ignore_index = -100; got {V} at position \[0, {PROMPT}\]"
    raised_on_ranks(ValueError, outside, lambda: call(with_first(torch.tensor([V, 5]))))

    of_options = "^dtype, whether gradients are taken, and all options must be the same on all ranks"
    for one, other in (
        ({"temperature": 1.0}, {"temperature": 2.0}),
        ({"outputs": ("entropy",)}, {"outputs": ("mean_logits",)}),
        ({"backward": "exact"}, {"backward": "certified"}),
        ({"hidden": batch.hidden}, {"hidden": batch.hidden.bfloat16()}),
        ({"hidden": batch.hidden}, {"hidden": leaf(batch.hidden)}),
    ):
        raised_on_ranks(ValueError, of_options, lambda options=(one, other)[rank]: call(**options))

    overlap, gap = ((0, SPLIT), (SPLIT - 100, V)), ((0, SPLIT), (SPLIT + 100, V))
    for rows in (overlap, gap, ((0, SPLIT), (SPLIT, V - 1)), ((10, SPLIT), (SPLIT, V)), ((0, V), (0, V))):
        raised_on_ranks(ValueError, "^vocab_shard must place every entry", lambda rows=rows: call(rows=rows))
    shards = rf"^vocab_shard must place.*\[\[0, {SPLIT}, {V}\], \[{SPLIT + 1}, {V + 1}, {V}\]\]"
    raised_on_ranks(ValueError, shards, lambda: call(start=(0, SPLIT + 1)))
    raised_on_ranks(ValueError, "^vocab_shard must place.*vocab_size", lambda: call(vocab_size=V + rank))
    raised_on_ranks(ValueError, "^vocab_shard must place.*vocab_size", lambda: call(vocab_size=V + 1))
    # The group is as good as before.
    same_on_ranks(logps=call().logps)


# --------------------------------------------------------------------------- heads of tensor-parallel plans


class Model(torch.nn.Module):
    def __init__(self, batch: Batch, has_bias: bool) -> None:
        super().__init__()
        vocab_size = batch.weight.shape[0]
        self.lm_head = torch.nn.Linear(H, vocab_size, bias=has_bias)
        with torch.no_grad():
            self.lm_head.weight.copy_(batch.weight)
            if has_bias:
                self.lm_head.bias.copy_(batch.bias)


def tensor_parallel(batch: Batch, has_bias: bool) -> torch.nn.Linear:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
    return parallelize_module(Model(batch, has_bias), mesh, plan).lm_head


PLANS = {
    "hidden of every rank": {},
    "hidden replicated": {"placement": Replicate},
    "hidden of a sequence-parallel plan": {"placement": lambda: Shard(1)},
    "packed, hidden split": {"placement": lambda: Shard(0), "packed": True},
    "bias": {"has_bias": True},
    "uneven": {"vocab_size": V - 1, "has_bias": True},
    "α-DPO": {"kind": "α-DPO"},
    "exact": {"backward": "exact"},
}


@check_of(TORCH, PLANS)
def head_of_a_tensor_parallel_plan(
    kind: str = "FocalPO",
    placement: Callable | None = None,
    packed: bool = False,
    has_bias: bool = False,
    vocab_size: int = V,
    **options,
) -> None:
    batch = make_batch(packed, vocab_size=vocab_size)
    head = tensor_parallel(batch, has_bias)
    hidden = leaf(batch.hidden)
    labels = batch.labels
    if placement is not None:
        mesh = head.weight.device_mesh
        hidden = leaf(distribute_tensor(batch.hidden, mesh, [placement()]))
        labels = distribute_tensor(batch.labels, mesh, [placement()])
    arguments = batch.references | {"cu_seqlens": batch.cu_seqlens}
    out = make_loss(kind, **options)(hidden, head.weight, labels, head.bias, **arguments)
    out.loss.backward()

    whole = {"hidden": leaf(batch.hidden), "weight": leaf(batch.weight)}
    whole |= {"bias": leaf(batch.bias)} if has_bias else {}
    expected = make_loss(kind, alone(), **options)(**whole, labels=batch.labels, **arguments)
    expected.loss.backward()
    agree_in_fields(out, expected, "dropped_mass", "kept_share")
    gradients = {"hidden": hidden.grad, **{name: x.grad for name, x in head.named_parameters()}}
    for name, x in whole.items():
        gradient = gradients[name]
        if name != "hidden" or placement is not None:
            expected_placement = Shard(0) if name != "hidden" else placement()
            assert isinstance(gradient, DTensor), f"d{name} is a {type(gradient).__name__}"
            assert gradient.placements == (expected_placement,), f"d{name} is {gradient.placements}"
            gradient = gradient.full_tensor()
        agree(f"d{name}", gradient, x.grad)
    same_on_ranks(loss=out.loss, **{name: DTensor.full_tensor(gradients[name]) for name in ("weight",)})


@check_of(TORCH)
def three_steps_of_a_tensor_parallel_plan() -> None:
    batch = make_batch()
    head, whole = tensor_parallel(batch, False).weight, leaf(batch.weight)
    optimizers = [torch.optim.SGD([weight], lr=0.05, momentum=0.9) for weight in (head, whole)]
    for step in range(3):
        batch = make_batch(seed=step)
        for weight, optimizer in zip((head, whole), optimizers, strict=True):
            out = make_loss("FocalPO")(batch.hidden, weight, batch.labels, **batch.references)
            optimizer.zero_grad()
            out.loss.backward()
            assert out.certificate().dhidden_bound > 0
            optimizer.step()
    agree("weight", head.full_tensor(), whole)


@check_of(TORCH)
def low_rank_update_of_a_tensor_parallel_plan() -> None:
    batch = make_batch()
    head, given = tensor_parallel(batch, False), low_rank_update(batch)
    b = leaf(distribute_tensor(given["update.weight"], head.weight.device_mesh, [Shard(0)]))
    low_rank = leaf(given["update.hidden"])
    result = linear_logps(
        batch.hidden, head.weight, batch.labels, update=LowRankUpdate(low_rank, b), tau=TAU, backend="torch"
    )
    result.logps.backward(cotangent(batch, False))
    expected, gradients = run_linear(batch, False, ("update.hidden", "update.weight"), outputs=())
    agree("logps", result.logps, expected.logps)
    agree("dupdate.hidden", low_rank.grad, gradients["update.hidden"])
    agree("dupdate.weight", b.grad.full_tensor(), gradients["update.weight"])


@check_of(TORCH)
def other_dtensors_are_refused() -> None:
    batch = make_batch()
    mesh = init_device_mesh("cpu", (2,))
    of_two = init_device_mesh("cpu", (2, 1))
    sharded = distribute_tensor(batch.weight, mesh, [Shard(0)])
    replicated = distribute_tensor(batch.hidden, mesh, [Replicate()])
    one_row = distribute_tensor(torch.ones(1, H), mesh, [Shard(0)])

    def call(weight, hidden=batch.hidden, function=linear_logps, **arguments):
        return lambda: function(hidden, weight, batch.labels, **arguments)

    by_vocabulary = r"^weight must be split by vocabulary, Shard\(0\), on .* one-dimensional mesh"
    for weight in (
        distribute_tensor(batch.weight, mesh, [Replicate()]),
        distribute_tensor(batch.weight, mesh, [Shard(1)]),
        distribute_tensor(batch.weight, of_two, [Shard(0), Replicate()]),
        distribute_tensor(batch.weight, of_two, [Shard(0), Shard(0)]),
    ):
        raised_on_ranks(ValueError, by_vocabulary, call(weight))
    raised_on_ranks(ValueError, "^vocab_shard must not be given", call(sharded, vocab_shard=shard()))
    raised_on_ranks(ValueError, "^weight must have rows on every rank", call(one_row))
    raised_on_ranks(TypeError, "^bias must be a DTensor", call(sharded, bias=batch.bias))
    plain = {"weight": batch.weight[own_rows()], "vocab_shard": shard()}
    raised_on_ranks(TypeError, "^hidden must be a plain tensor", call(hidden=replicated, **plain))
    loss_fn = make_loss("SimPO")
    raised_on_ranks(TypeError, "^hidden must be a plain tensor", call(batch.weight, replicated, loss_fn))
    on_other = distribute_tensor(batch.hidden, of_two, [Replicate(), Replicate()])
    raised_on_ranks(ValueError, "^hidden must be on the mesh of weight", call(sharded, on_other))

    for weight, ref_weight in ((sharded, batch.weight), (batch.weight, sharded)):
        kl_of = partial(linear_kl, batch.hidden, weight, batch.hidden, ref_weight, batch.labels)
        raised_on_ranks(TypeError, "weight must be a plain tensor; got a DTensor", kl_of)


@check_of(TORCH)
def a_changed_weight_of_a_tensor_parallel_plan_is_noticed() -> None:
    batch = make_batch()
    head = tensor_parallel(batch, False).weight
    out = make_loss("FocalPO")(batch.hidden, head, batch.labels, **batch.references)
    out.loss.backward()
    torch.optim.SGD([head], lr=0.05).step()
    raised_on_ranks(RuntimeError, r"^certificate\(\) needs the weight of the forward", out.certificate)
