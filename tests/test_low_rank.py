"""A low-rank update of the head: the same as a head of H + R columns, and as LoRA merged into the weight.

What holds with an update as without is in `test_linear_logps.py` (masks, shifts, strides, autocast),
`test_numerics.py` (NaN) and `test_certified.py` (gradients of the kept pairs).
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from conftest import DEVICE, LOW_PRECISION
from problems import (
    DTYPES,
    EPS,
    NAMES,
    OUTPUTS,
    Problem,
    assert_accurate,
    assert_equal,
    each_dtype,
    each_dtype_and_float64,
    outcome,
    problem,
    sharp_problem,
)
from tolerance import assert_as_accurate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from focalkern import LowRankUpdate, linear_logps

TAU = 2.0**-9
ALL_OF_THEM = {"has_bias": True, "softcap": 4.0, "logit_scale": -0.7, "temperature": 1.3}
either_backward = pytest.mark.parametrize("tau", [0.0, TAU], ids=["exact", "certified"])


def measure(head: Problem, backend: str, trained=NAMES, **options) -> dict[str, torch.Tensor]:
    leaves = head.leaves(trained=trained)
    return outcome(head, head.run(backend, leaves, **options), leaves)


# Values and gradients


@pytest.mark.parametrize("options", [{}, {"rank": 3, **ALL_OF_THEM}], ids=str)
def test_the_reference_of_an_update_is_that_of_a_wider_head(options):
    head = problem(2, 5, **{"rank": 8, "dtype": torch.float64, **options})
    leaves = head.leaves()
    wide = Problem(
        hidden=torch.cat([leaves["hidden"], leaves["update_hidden"]], -1),
        weight=torch.cat([leaves["weight"], leaves["update_weight"]], -1),
        bias=leaves.get("bias"),
        labels=head.labels,
        grad=head.grad,
        transform=head.transform,
    )
    of_wide = outcome(head, wide.plain(wide.tensors), leaves)
    for name, value in outcome(head, head.plain(leaves), leaves).items():
        torch.testing.assert_close(value, of_wide[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        *({"rank": rank} for rank in (1, 8, 40, 64, 136)),
        {"rank": 16, "has_bias": True},
        {"rank": 16, "softcap": 4.0},
        {"rank": 16, **ALL_OF_THEM},
    ],
    ids=str,
)
@each_dtype_and_float64
def test_values_and_gradients_match_the_reference(backend, dtype, options):
    assert_accurate(
        problem(2, 11, vocab_size=300, dtype=dtype, **options), backend, outputs=OUTPUTS, backward="exact"
    )


@each_dtype
def test_the_gradient_through_the_entropy_matches_the_reference(dtype, backend):
    head = problem(2, 9, dtype=dtype, rank=40, **ALL_OF_THEM)
    assert_accurate(head, backend, {"logps": head.grad, "entropy": head.grad.flip(0)}, outputs=("entropy",))


@pytest.mark.parametrize("options", [{}, ALL_OF_THEM], ids=["plain", "all of them"])
def test_gradcheck_in_float64(options):
    head = problem(1, 5, rank=3, hidden_size=4, vocab_size=7, dtype=torch.float64, **options)
    leaves = head.leaves()

    def logps(*tensors):
        return head.run("torch", dict(zip(leaves, tensors, strict=True))).logps

    assert torch.autograd.gradcheck(logps, tuple(leaves.values()))


@each_dtype
def test_lora_is_the_merged_weight(dtype, backend):
    """Gradients of LoRA's own tensors, and of hidden on both its ways."""
    head, scaling = problem(3, 7, dtype=dtype, rank=8), 0.75
    a = torch.randn(8, 24, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype) / 24**0.5

    def tensors(dtype):
        leaves = head.leaves(dtype)
        del leaves["update_hidden"]
        return {**leaves, "a": a.to(dtype, copy=True).requires_grad_()}

    def merged(dtype):
        leaves = tensors(dtype)
        weight = leaves["weight"] + scaling * leaves["update_weight"] @ leaves["a"]
        return outcome(head, head.plain({"hidden": leaves["hidden"], "weight": weight}), leaves)

    leaves = tensors(dtype)
    update = LowRankUpdate.lora(leaves["hidden"], leaves["a"], leaves["update_weight"], scaling)
    result = linear_logps(leaves["hidden"], leaves["weight"], head.labels, update=update, backend=backend)
    naive, exact = merged(dtype), merged(torch.float64)
    for name, value in outcome(head, result, leaves).items():
        # Terms of a sum cancel to no less than a tenth. Merging rounds a weight once; LoRA's own product, in
        # this dtype, is rounded and multiplied again.
        limit = 10 * head.largest_logit() + torch.finfo(dtype).eps / EPS
        assert_as_accurate(value, naive[name], exact[name], name, limit)


def test_an_update_of_zeros_changes_nothing(backend):
    head = problem(2, 7, rank=16, has_bias=True)
    head.update_weight.zero_()
    found = measure(head, backend, outputs=OUTPUTS)
    assert not found["update_hidden"].any()
    assert found["update_weight"].any()
    head.update_hidden = head.update_weight = None
    without = head.run(backend, outputs=OUTPUTS)
    for name in ("logps", *OUTPUTS):
        assert torch.equal(found[name], getattr(without, name)), name


@pytest.mark.parametrize("dtype", [DTYPES[0], DTYPES[-1]], ids=str)
@either_backward
def test_two_runs_are_bitwise_equal(tau, dtype, backend):
    head = sharp_problem(rank=40, dtype=dtype)
    assert_equal(*(measure(head, backend, tau=tau) for _ in range(2)))


# Which gradients come back, and what they cost


@functools.cache
def with_all_gradients(backend: str, tau: float) -> tuple[Problem, dict[str, torch.Tensor]]:
    head = sharp_problem(rank=16, has_bias=True)
    return head, measure(head, backend, tau=tau)


@either_backward
@pytest.mark.parametrize(
    "trained",
    [
        ("hidden", "update_hidden", "update_weight"),
        ("update_weight",),
        ("update_hidden",),
        ("weight", "update_hidden"),
        ("hidden",),
        ("bias", "update_weight"),
    ],
    ids="+".join,
)
def test_only_what_is_trained_gets_a_gradient_and_the_same_one(trained, tau, backend):
    head, expected = with_all_gradients(backend, tau)
    leaves = head.leaves(trained=trained)
    result = head.run(backend, leaves, tau=tau)
    result.logps.backward(head.grad)
    assert (result.kept_share < 0.4) == (tau > 0)
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, expected[name]) if name in trained else leaf.grad is None


class Made(TorchDispatchMode):
    """Sizes of what operations allocate, and shapes of the results of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[int] = []
        self.products: list[torch.Size] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {x.untyped_storage().data_ptr() for x in tensors_of((args, kwargs))}
        out = function(*args, **(kwargs or {}))
        # The interpreter puts its copies of a kernel's arguments into tensors by `set_`.
        if "aten.set_" not in str(function):
            made = (x for x in tensors_of(out) if x.untyped_storage().data_ptr() not in before)
            self.allocated += [x.numel() for x in made if x.is_floating_point()]
        if any(name in str(function) for name in ("linear", "mm")):
            self.products += [x.shape for x in tensors_of(out)]
        return out


def tensors_of(tree: object) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


@pytest.fixture
def one_thread():
    """A dispatch mode does not see into the threads of the torch backend's certified backward."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@either_backward
def test_a_frozen_weight_costs_nothing_of_its_size_and_no_product(tau, backend, one_thread):
    n, rank, hidden_size, vocab_size = 42, 8, 40, 5120  # a chunk has 4096 of its entries
    head = sharp_problem(n, rank=rank, hidden_size=hidden_size, vocab_size=vocab_size, sharpness=14.0)

    def measure(*trained):
        leaves = head.leaves(trained=trained)
        with Made() as made:
            result = head.run(backend, leaves, tau=tau)
            result.logps.backward(head.grad)
        assert (result.kept_share < 0.4) == (tau > 0)
        # Those of the gradients: the logits' product is rows × vocabulary.
        return max(made.allocated), {shape for shape in made.products if {hidden_size, rank} & {*shape}}

    trained = set(NAMES) - {"weight"}
    largest, products = measure(*trained)
    assert largest < vocab_size * hidden_size < n * vocab_size
    largest_with_dweight, products_with_dweight = measure(*NAMES)
    assert largest_with_dweight >= vocab_size * hidden_size
    if backend == "torch":
        assert products < products_with_dweight
        assert {min(shape) for shape in measure("update_hidden", "update_weight")[1]} == {rank}
        assert not {rank} & {size for shape in measure("hidden")[1] for size in shape}


# LoRA under autocast


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_lora_under_autocast_multiplies_as_a_linear_layer(dtype):
    head = problem(2, 6, rank=8)
    a = torch.randn(8, 24, device=DEVICE)
    with torch.autocast(DEVICE.type, dtype=dtype):
        update = LowRankUpdate.lora(head.hidden, a, head.update_weight, 0.5)
    assert update.hidden.dtype == dtype
    assert torch.equal(update.hidden, 0.5 * (head.hidden.to(dtype) @ a.to(dtype).T))


# Bad input

BAD_UPDATES = {
    "not an update": (lambda h, w: (h, w), TypeError, "update", "tuple"),
    "hidden not a tensor": (lambda h, w: LowRankUpdate(None, w), TypeError, "update.hidden", "NoneType"),
    "weight not a tensor": (lambda h, w: LowRankUpdate(h, [1.0]), TypeError, "update.weight", "list"),
    "hidden of other dtype": (
        lambda h, w: LowRankUpdate(h.half(), w),
        TypeError,
        "update.hidden",
        "torch.float16",
    ),
    "weight of other dtype": (
        lambda h, w: LowRankUpdate(h, w.half()),
        TypeError,
        "update.weight",
        "torch.float16",
    ),
    "other tokens": (lambda h, w: LowRankUpdate(h[:, :2], w), ValueError, "update.hidden", "[2, 2, 4]"),
    "flat tokens": (lambda h, w: LowRankUpdate(h.view(6, 4), w), ValueError, "update.hidden", "[6, 4]"),
    "other rank": (lambda h, w: LowRankUpdate(h[..., :3], w), ValueError, "update.hidden", "[2, 3, 3]"),
    "other vocabulary": (lambda h, w: LowRankUpdate(h, w[:9]), ValueError, "update.weight", "[9, 4]"),
    "transposed weight": (lambda h, w: LowRankUpdate(h, w.T), ValueError, "update.weight", "[4, 10]"),
    "no rank": (lambda h, w: LowRankUpdate(h[..., :0], w[:, :0]), ValueError, "update.weight", "[10, 0]"),
    "on another device": (
        lambda h, w: LowRankUpdate(h, w.to("meta")),
        ValueError,
        "update.weight",
        "meta",
    ),
}


@pytest.mark.parametrize("case", BAD_UPDATES)
def test_a_bad_update_is_refused_by_name(case):
    make, exception, name, came = BAD_UPDATES[case]
    update = make(torch.zeros(2, 3, 4), torch.zeros(10, 4))
    labels = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(exception, match=rf"^{name} must (be|have) ") as refused:
        linear_logps(torch.zeros(2, 3, 8), torch.zeros(10, 8), labels, update=update)
    assert came in str(refused.value).partition("; got ")[2]


BAD_LORAS = {
    "a of another width": ({"a": torch.zeros(4, 7)}, ValueError, "a", "[4, 7]"),
    "a sharded away": ({"a": torch.zeros(0)}, ValueError, "a", "gather it first"),
    "a not a tensor": ({"a": 1.0}, TypeError, "a", "float"),
    "a of other dtype": ({"a": torch.zeros(4, 8, dtype=torch.float16)}, TypeError, "a", "float16"),
    "b of another rank": ({"b": torch.zeros(10, 3)}, ValueError, "b", "[10, 3]"),
    "scaling not a number": ({"scaling": None}, TypeError, "scaling", "None"),
    "scaling not finite": ({"scaling": math.nan}, ValueError, "scaling", "nan"),
}


@pytest.mark.parametrize("case", BAD_LORAS)
def test_a_bad_lora_is_refused_by_name(case):
    changes, exception, name, came = BAD_LORAS[case]
    inputs = {"hidden": torch.zeros(2, 3, 8), "a": torch.zeros(4, 8), "b": torch.zeros(10, 4)}
    with pytest.raises(exception, match=rf"^{name} must (be|have) ") as refused:
        LowRankUpdate.lora(**inputs | changes)
    assert came in str(refused.value)
