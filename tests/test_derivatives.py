"""First derivatives and no others: what asks for more, or traces, gets an error that names the library."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from conftest import DEVICE
from problems import Batch, batch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import functional
from torch.utils.checkpoint import checkpoint

from focalkern import (
    FusedFocalPOLoss,
    FusedPairLoss,
    LinearLogps,
    linear_kl,
    linear_logps,
    methods,
    reference,
)
from focalkern.autograd import FirstOrderFunction


@pytest.fixture
def pairs() -> Batch:
    return batch()


def focal(pairs, hidden, weight, backend):
    return FusedFocalPOLoss(backend=backend)(hidden, weight, pairs.labels, **pairs.refs).loss


def pair(pairs, hidden, weight, backend):
    return FusedPairLoss(methods.ipo, backend=backend)(hidden, weight, pairs.labels, **pairs.refs).loss


def logps(pairs, hidden, weight, backend):
    return linear_logps(hidden, weight, pairs.labels, backend=backend).logps.sum()


def squares(pairs, hidden, weight, backend):
    return linear_logps(hidden, weight, pairs.labels, backend=backend).logps.square().sum()


def entropy(pairs, hidden, weight, backend):
    return linear_logps(hidden, weight, pairs.labels, outputs="entropy", backend=backend).entropy.sum()


def kl(pairs, hidden, weight, backend):
    ref = (pairs.hidden.flip(0), pairs.weight.flip(0))
    return linear_kl(hidden, weight, *ref, pairs.labels, backend=backend).sum()


def given_logps(pairs, hidden, weight, backend):
    own = LinearLogps(reference.linear_logps(hidden, weight, pairs.labels)["logps"])
    return FusedPairLoss(methods.dpo, backend=backend).from_logps(own, pairs.labels, **pairs.refs).loss


every_function = pytest.mark.parametrize(
    "function", [focal, pair, logps, squares, entropy, kl, given_logps], ids=lambda f: f.__name__
)


def penalty(loss, hidden, weight):
    (gradient,) = torch.autograd.grad(loss(hidden, weight), hidden, create_graph=True)
    (gradient.square().sum() + 0 * weight.sum()).backward()


SECOND_ORDER = {
    "a penalty on the gradient": penalty,
    "backward(create_graph=True)": lambda loss, h, w: loss(h, w).backward(create_graph=True),
    "hvp": lambda loss, h, w: functional.hvp(lambda x: loss(x, w), h, torch.ones_like(h)),
    "vhp": lambda loss, h, w: functional.vhp(lambda x: loss(x, w), h, torch.ones_like(h)),
    "jvp by two backwards": lambda loss, h, w: functional.jvp(lambda x: loss(x, w), h, torch.ones_like(h)),
}


@every_function
@pytest.mark.parametrize("ask", SECOND_ORDER)
def test_a_graph_of_the_backward_is_refused(ask, function, pairs, backend):
    hidden, weight = pairs.leaves().values()
    with pytest.raises(RuntimeError, match=r"^focalkern has no second derivatives.*focalkern\.reference"):
        SECOND_ORDER[ask](lambda h, w: function(pairs, h, w, backend), hidden, weight)


def test_what_does_not_pass_through_the_library_twice_is_exact(backend):
    """A user's own tensor in the loss: its gradient is a function of the log-probs, and differentiable."""
    pairs = batch()

    def penalty_gradients(loss, *leaves):
        offset = torch.tensor([0.3, -0.2, 0.1], dtype=leaves[0].dtype, device=DEVICE, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(offset), offset, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaves)

    leaves = list(pairs.leaves().values())
    loss_fn = FusedPairLoss(methods.odpo, backend=backend, backward="exact")
    found = penalty_gradients(
        lambda offset: loss_fn(*leaves, pairs.labels, **pairs.refs, offset=offset).loss, *leaves
    )

    exact = [x.detach().double().requires_grad_() for x in leaves]
    refs = {name: x.double() for name, x in pairs.refs.items()}
    expected = penalty_gradients(
        lambda offset: reference.focalpo_loss(
            *exact, pairs.labels, **refs, beta=0.1, gamma=0.0, margin=offset
        ).mean(),
        *exact,
    )
    for actual, right in zip(found, expected, strict=True):
        assert right.any()
        torch.testing.assert_close(actual.double(), right, rtol=1e-4, atol=1e-7)


def batched(loss, hidden, weight):
    torch.autograd.grad(loss(hidden, weight), hidden, torch.ones(3, device=DEVICE), is_grads_batched=True)


def mapped(loss, hidden, weight):
    value = loss(hidden, weight)
    torch.func.vmap(lambda v: torch.autograd.grad(value, hidden, v)[0])(torch.ones(3, device=DEVICE))


@every_function
@pytest.mark.parametrize("ask", [batched, mapped], ids=lambda f: f.__name__)
def test_several_gradients_at_once_are_refused(ask, function, pairs, backend):
    hidden, weight = pairs.leaves().values()
    with pytest.raises(RuntimeError, match=r"^focalkern's backward takes one gradient at a time"):
        ask(lambda h, w: function(pairs, h, w, backend), hidden, weight)


@every_function
def test_forward_mode_is_refused(function, pairs, backend):
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=r"^focalkern has no forward-mode derivatives"),
    ):
        dual = forward_ad.make_dual(pairs.hidden, torch.ones_like(pairs.hidden))
        function(pairs, dual, pairs.weight, backend)


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x])),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
}


@every_function
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_func_are_refused(transform, function, pairs, backend):
    with pytest.raises(RuntimeError, match=r" came in a transform of torch\.func .*focalkern takes none"):
        TRANSFORMS[transform](lambda x: function(pairs, x, pairs.weight, backend), pairs.hidden)


def test_labels_in_a_transform_are_refused(pairs):
    labels = torch.stack([pairs.labels] * 2)
    with pytest.raises(RuntimeError, match=r" came in a transform of torch\.func"):
        torch.func.vmap(lambda y: linear_logps(pairs.hidden, pairs.weight, y).logps)(labels)


@every_function
def test_first_derivatives_by_other_ways_are_the_same(function, pairs, backend):
    """Checkpointing of both kinds, `functional.vjp`, and `functional_call`, which is no transform."""
    hidden, weight = pairs.leaves().values()

    def loss(h, w):
        return function(pairs, h, w, backend)

    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    for use_reentrant in (False, True):
        leaves = list(pairs.leaves().values())
        checkpoint(loss, *leaves, use_reentrant=use_reentrant).backward()
        assert all(torch.equal(x.grad, grad) for x, grad in zip(leaves, expected, strict=True))
    assert torch.equal(functional.vjp(lambda x: loss(x, weight.detach()), hidden.detach())[1], expected[0])

    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros_like(weight))

        def forward(self, h):
            return loss(h, self.weight)

    value = torch.func.functional_call(Head(), {"weight": weight}, (hidden,))
    assert torch.equal(torch.autograd.grad(value, weight)[0], expected[1])


def test_every_autograd_function_of_the_library_is_of_the_kind():
    theirs = [
        value
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == "focalkern"
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, torch.autograd.Function)
    ]
    kinds = {value for value in theirs if value.__module__.partition(".")[0] == "focalkern"}
    assert len(kinds) >= 6  # five, and their base
    assert all(issubclass(kind, FirstOrderFunction) for kind in kinds)


@pytest.mark.parametrize("function", [focal, pair, logps, kl], ids=lambda f: f.__name__)
def test_fullgraph_is_refused(function, pairs, backend):
    def compiled():
        torch._dynamo.reset()
        step = torch.compile(lambda x: 2 * function(pairs, x, pairs.weight, backend), fullgraph=True)
        step(pairs.hidden)

    with pytest.raises(Exception, match="focalkern is not traced: compile without fullgraph=True"):
        compiled()


FRESH_PROCESS = """
import torch
from focalkern import linear_logps
hidden, weight, labels = torch.randn(2, 3, 8), torch.randn(20, 8), torch.zeros(2, 3, dtype=torch.int64)
step = lambda: 2 * linear_logps(hidden, weight, labels).logps
try:
    torch.compile(step, fullgraph=True, backend="eager")()
except Exception as error:
    print(error)
torch._dynamo.reset()
print("equal:", torch.equal(torch.compile(step, backend="eager")(), step()))
"""


def test_the_first_call_of_a_process_may_be_one_that_is_compiled():
    """torch._dynamo, which the library does not import, is not there before."""
    found = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS], capture_output=True, text=True, check=True, timeout=300
    ).stdout
    assert "focalkern is not traced: compile without fullgraph=True" in found
    assert "equal: True" in found


def focal_of_any(hidden, weight, labels):
    return FusedFocalPOLoss(reference_free=True)(hidden, weight, labels)


def kl_of_any(hidden, weight, labels):
    return linear_kl(hidden, weight, hidden, weight, labels)


def from_logps_of_any(hidden, weight, labels):
    own = LinearLogps(hidden[..., 0])
    return FusedPairLoss(methods.sft).from_logps(own, labels)


every_input = pytest.mark.parametrize(
    "function", [linear_logps, focal_of_any, kl_of_any, from_logps_of_any], ids=lambda f: f.__name__
)


def tensors(**options) -> list[torch.Tensor]:
    return [
        torch.zeros(2, 3, 8, **options),
        torch.zeros(20, 8, **options),
        torch.zeros(2, 3, dtype=torch.int64, **options),
    ]


@every_input
def test_meta_tensors_are_refused(function):
    with pytest.raises(
        TypeError, match="must hold values, which focalkern reads; got a meta tensor: load the"
    ):
        function(*tensors(device="meta"))


def test_a_weight_that_was_not_loaded_is_refused():
    hidden, _, labels = tensors()
    with pytest.raises(ValueError, match=r"^weight must be on .*; got meta, which holds no values: load the"):
        linear_logps(hidden, torch.zeros(20, 8, device="meta"), labels)


@every_input
def test_fake_tensors_are_refused(function):
    message = "must hold values, which focalkern reads; got a FakeTensor: call it outside"
    with FakeTensorMode(), pytest.raises(TypeError, match=message):
        function(*tensors())


def test_export_is_refused():
    class Model(torch.nn.Module):
        def forward(self, *inputs):
            return linear_logps(*inputs).logps

    with pytest.raises(TypeError, match=r"which focalkern reads; got a FakeTensor: .* torch.export"):
        torch.export.export(Model(), tuple(tensors()), strict=False)
