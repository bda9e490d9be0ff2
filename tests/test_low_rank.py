"""A low-rank update of the head: the same as a head of H + R columns, and as LoRA merged into the weight."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE, INTERPRETED, LOW_PRECISION
from tolerance import assert_as_accurate, relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import focalkern.logps.function
from focalkern import LowRankUpdate, linear_logps, reference

DTYPES = [torch.float32, *LOW_PRECISION]
OUTPUTS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
NAMES = ("hidden", "weight", "bias", "update_hidden", "update_weight")
TAU = 2.0**-9
EPS = torch.finfo(torch.float32).eps
OPTIONS = {
    "plain": {},
    "bias": {"has_bias": True},
    "softcap": {"softcap": 4.0},
    "all of them": {"has_bias": True, "softcap": 4.0, "logit_scale": -0.7, "temperature": 1.3},
}


class Head:
    """Random tokens, a third of them masked, and a head whose update is about as large as its weight."""

    def __init__(
        self,
        *shape: int,
        rank: int = 8,
        hidden_size: int = 24,
        vocab_size: int = 300,
        dtype: torch.dtype = torch.float32,
        sharpness: float = 3.0,
        has_bias: bool = False,
        **options,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        tensors = {
            "hidden": draw(*shape, hidden_size),
            "weight": draw(vocab_size, hidden_size) * sharpness / hidden_size**0.5,
            "bias": draw(vocab_size) if has_bias else None,
            "update_hidden": draw(*shape, rank),
            "update_weight": draw(vocab_size, rank) * sharpness / rank**0.5,
        }
        self.tensors = {name: x.to(DEVICE, dtype) for name, x in tensors.items() if x is not None}
        self.labels = torch.randint(vocab_size, shape, generator=generator).to(DEVICE)
        self.labels[(torch.rand(shape, generator=generator) < 1 / 3).to(DEVICE)] = -100
        self.grad = draw(*shape).to(DEVICE)
        self.dtype, self.options = dtype, options

    def leaves(self, dtype: torch.dtype | None = None, trained=NAMES) -> dict[str, torch.Tensor]:
        return {
            name: x.detach().to(dtype or x.dtype, copy=True).requires_grad_(name in trained)
            for name, x in self.tensors.items()
        }

    def run(self, leaves: dict[str, torch.Tensor], backend: str, **options):
        hidden, weight, bias, *update = (leaves.get(name) for name in NAMES)
        options = {"labels": self.labels} | self.options | options
        return linear_logps(
            hidden, weight, bias=bias, backend=backend, update=LowRankUpdate(*update), **options
        )

    def wide(self, leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The reference of a head of H + R columns."""
        hidden, weight, bias, *update = (leaves.get(name) for name in NAMES)
        hidden, weight = (torch.cat(x, dim=-1) for x in ((hidden, update[0]), (weight, update[1])))
        return reference.linear_logps(hidden, weight, self.labels, bias, **self.options)

    def plain(self, leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The reference given the update."""
        hidden, weight, bias, *update = (leaves.get(name) for name in NAMES)
        update = LowRankUpdate(*update)
        return reference.linear_logps(hidden, weight, self.labels, bias, update=update, **self.options)

    def conditioning(self) -> float:
        """fp32 knows a logit to an ulp of the largest; here terms of a sum cancel to no less than a tenth."""
        x = [self.tensors[name].double() for name in ("hidden", "weight", "update_hidden", "update_weight")]
        return 10 * (x[0] @ x[1].T + x[2] @ x[3].T).abs().max().item()

    def gradients(self, values, leaves, grad_entropy=None) -> dict[str, torch.Tensor]:
        total = (values["logps"] * self.grad).sum()
        if grad_entropy is not None:
            total = total + (values["entropy"] * grad_entropy).sum()
        trained = {name: x for name, x in leaves.items() if x.requires_grad}
        return dict(zip(trained, torch.autograd.grad(total, list(trained.values())), strict=True))


def outcome(head: Head, result, leaves, grad_entropy=None) -> dict[str, torch.Tensor]:
    """Values and gradients of the library or of the reference, by name."""
    values = result if isinstance(result, dict) else vars(result)
    named = {name: values[name] for name in ("logps", *OUTPUTS) if values[name] is not None}
    return {**named, **head.gradients(values, leaves, grad_entropy)}


def assert_matches(head: Head, actual: dict[str, torch.Tensor], grad_entropy=None) -> None:
    leaves = [head.leaves(head.dtype), head.leaves(torch.float64)]
    naive = outcome(head, head.plain(leaves[0]), leaves[0], grad_entropy)
    exact = outcome(head, head.wide(leaves[1]), leaves[1], grad_entropy)
    for name, value in actual.items():
        assert value.shape == exact[name].shape
        if name == "is_top1":
            assert torch.equal(value, exact[name])
        else:
            assert_as_accurate(value, naive[name], exact[name], name, head.conditioning())


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        assert torch.equal(actual[name], expected[name]), name


# Values and gradients


@pytest.mark.parametrize(
    ("rank", "options"),
    [*((rank, "plain") for rank in (1, 8, 40, 64, 136)), *((16, options) for options in OPTIONS)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_are_those_of_a_wider_head(dtype, rank, options, backend):
    head = Head(2, 11, rank=rank, dtype=dtype, **OPTIONS[options])
    leaves = head.leaves()
    result = head.run(leaves, backend, outputs=OUTPUTS, backward="exact")
    assert_matches(head, outcome(head, result, leaves))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_through_the_entropy_is_that_of_a_wider_head(dtype, backend):
    head = Head(2, 9, dtype=dtype, rank=40, **OPTIONS["all of them"])
    leaves = head.leaves()
    result = head.run(leaves, backend, outputs=("entropy",))
    assert_matches(head, outcome(head, result, leaves, head.grad.flip(0)), head.grad.flip(0))


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck_in_float64(options):
    head = Head(1, 5, rank=3, hidden_size=4, vocab_size=7, dtype=torch.float64, **OPTIONS[options])
    leaves = head.leaves()

    def logps(*tensors):
        return head.run(dict(zip(leaves, tensors, strict=True)), "torch").logps

    assert torch.autograd.gradcheck(logps, tuple(leaves.values()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_is_the_merged_weight(dtype, backend):
    """Gradients of LoRA's own tensors, and of hidden on both its ways."""
    head, scaling = Head(3, 7, dtype=dtype, rank=8), 0.75
    a = torch.randn(8, 24, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype) / 24**0.5

    def tensors(dtype):
        leaves = head.leaves(dtype)
        del leaves["update_hidden"]
        return {**leaves, "a": a.to(dtype, copy=True).requires_grad_()}

    def merged(dtype):
        leaves = tensors(dtype)
        weight = leaves["weight"] + scaling * leaves["update_weight"] @ leaves["a"]
        values = reference.linear_logps(leaves["hidden"], weight, head.labels)
        return {"logps": values["logps"], **head.gradients(values, leaves)}

    leaves = tensors(dtype)
    update = LowRankUpdate.lora(leaves["hidden"], leaves["a"], leaves["update_weight"], scaling)
    result = linear_logps(leaves["hidden"], leaves["weight"], head.labels, update=update, backend=backend)
    naive, exact = merged(dtype), merged(torch.float64)
    for name, value in {"logps": result.logps, **head.gradients(vars(result), leaves)}.items():
        # Merging rounds a weight once; LoRA's own product, in this dtype, is rounded and multiplied again.
        conditioning = head.conditioning() + torch.finfo(dtype).eps / EPS
        assert_as_accurate(value, naive[name], exact[name], name, conditioning)


def test_an_update_of_zeros_changes_nothing(backend):
    head = Head(2, 7, rank=16, has_bias=True)
    head.tensors["update_weight"].zero_()
    leaves = head.leaves()
    result = head.run(leaves, backend, outputs=OUTPUTS)
    without = linear_logps(
        leaves["hidden"],
        leaves["weight"],
        head.labels,
        bias=leaves["bias"],
        backend=backend,
        outputs=OUTPUTS,
    )
    for name in ("logps", *OUTPUTS):
        assert torch.equal(getattr(result, name), getattr(without, name)), name
    gradients = head.gradients(vars(result), leaves)
    assert not gradients["update_hidden"].any()
    assert gradients["update_weight"].any()


def test_shifted_labels_of_several_dimensions(backend):
    head = Head(2, 2, 5, rank=5)
    leaves, sliced_leaves = head.leaves(), head.leaves()
    shifted = head.run(leaves, backend, shift=True, outputs=OUTPUTS)
    sliced = linear_logps(
        sliced_leaves["hidden"][..., :-1, :],
        sliced_leaves["weight"],
        head.labels[..., 1:],
        update=LowRankUpdate(sliced_leaves["update_hidden"][..., :-1, :], sliced_leaves["update_weight"]),
        backend=backend,
        outputs=OUTPUTS,
    )
    head.grad = head.grad[..., 1:]
    assert_equal(outcome(head, shifted, leaves), outcome(head, sliced, sliced_leaves))


@pytest.mark.parametrize("layout", ["transposed", "every other column", "rows of a wider tensor", "expanded"])
@pytest.mark.parametrize("name", ["update_hidden", "update_weight"])
@pytest.mark.parametrize("rank", [16, 20])
def test_non_contiguous_updates_give_the_same(rank, name, layout, backend):
    head = Head(1, 12, rank=rank)
    x = head.tensors[name]
    if layout == "transposed":
        strided = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif layout == "every other column":
        strided = x.repeat_interleave(2, dim=-1)[..., ::2]
    elif layout == "rows of a wider tensor":
        strided = torch.cat([x, torch.full_like(x, math.nan)], dim=-1)[..., :rank]
    else:
        strided = x[..., :1, :].expand_as(x)
    assert not strided.is_contiguous()
    head.tensors[name] = strided
    leaves = head.leaves() | {name: strided.detach().requires_grad_()}
    actual = outcome(head, head.run(leaves, backend), leaves)
    head.tensors[name] = strided.contiguous()
    assert_matches(head, actual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [0.0, TAU], ids=["exact", "certified"])
def test_two_runs_are_bitwise_equal(tau, dtype, backend):
    head = sharp(rank=40, dtype=dtype)

    def measure():
        leaves = head.leaves()
        result = head.run(leaves, backend, tau=tau)
        return {"logps": result.logps, **head.gradients(vars(result), leaves)}

    assert_equal(measure(), measure())


# Certified


@pytest.fixture
def kept(monkeypatch):
    """The (completion token, block) pairs of the last certified backward."""
    found = []
    list_pairs = focalkern.logps.function.list_pairs

    def spy(selection, counts):
        found.append(selection.keep)
        return list_pairs(selection, counts)

    monkeypatch.setattr(focalkern.logps.function, "list_pairs", spy)
    return found


def sharp(tokens: int = 60, **options) -> Head:
    """A softmax so sharp that most blocks of most tokens hold next to nothing."""
    return Head(tokens, vocab_size=1400, hidden_size=48, sharpness=10.0, **options)


def gradients_of_pairs(head: Head, dtype, keep=None) -> dict[str, torch.Tensor]:
    """Written out: dz, of the kept (token, block) pairs alone, rounded to `dtype`, and its products."""
    x = {name: tensor.detach() for name, tensor in head.leaves(dtype).items()}
    live = head.labels != -100
    hidden = torch.cat([x["hidden"], x["update_hidden"]], dim=-1)[live]
    weight = torch.cat([x["weight"], x["update_weight"]], dim=-1)
    logits = torch.nn.functional.linear(hidden, weight, x.get("bias"))
    logits = logits.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    z = logits * head.options.get("logit_scale", 1.0)
    if "softcap" in head.options:
        z = head.options["softcap"] * torch.tanh(z / head.options["softcap"])
    z = z / head.options.get("temperature", 1.0)
    onehot = torch.nn.functional.one_hot(head.labels[live], len(weight))
    dlogps = head.grad[live, None].to(z.dtype) * (onehot - z.detach().softmax(-1))
    (dz,) = torch.autograd.grad(z, logits, dlogps)
    if keep is not None:
        dz = dz * keep[: len(dz)].repeat_interleave(128, 1)[:, : len(weight)]
    dz = dz.to(dtype)
    dhidden = torch.zeros(len(live), hidden.shape[1], dtype=dtype, device=DEVICE)
    dhidden[live] = dz @ weight
    sizes = [x["hidden"].shape[1], x["update_hidden"].shape[1]]
    dweight = (dz.T @ hidden).split(sizes, dim=1)
    dhidden = dhidden.split(sizes, dim=1)
    return dict(zip(NAMES, (dhidden[0], dweight[0], dz.sum(0), dhidden[1], dweight[1]), strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 1},
        {"rank": 8},
        {"rank": 16, "has_bias": True},
        {"rank": 40, "softcap": 150.0, "has_bias": True},
        {"rank": 136, "temperature": 0.7, "logit_scale": 1.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_certified_gradients_are_those_of_the_kept_pairs(dtype, options, backend, kept):
    head = sharp(dtype=dtype, **options)
    leaves = head.leaves()
    result = head.run(leaves, backend, tau=TAU)
    actual = head.gradients(vars(result), leaves)
    assert 0.05 < result.kept_share < 0.4
    exact = gradients_of_pairs(head, torch.float64, kept[-1])
    naive = gradients_of_pairs(head, dtype, kept[-1])
    for name, value in actual.items():
        assert_as_accurate(value, naive[name], exact[name], name, head.conditioning() / 10)


def test_vocabulary_that_nothing_needs_has_zero_gradients(backend, kept):
    head = sharp(tokens=6, rank=16, has_bias=True)
    leaves = head.leaves()
    gradients = head.gradients(vars(head.run(leaves, backend, tau=TAU)), leaves)
    needed = kept[-1].any(0).repeat_interleave(128)[:1400]
    assert not needed.all()
    for name in ("weight", "bias", "update_weight"):
        assert not gradients[name][~needed].any()
        assert gradients[name][needed].any()


def test_the_bound_holds_for_hidden_and_in_its_form_for_the_update(backend):
    head = sharp(rank=16)
    leaves = head.leaves()
    result = head.run(leaves, backend, tau=2.0**-5)
    actual, exact = head.gradients(vars(result), leaves), gradients_of_pairs(head, torch.float64)
    dropped = head.grad.abs() * result.dropped_mass.double()
    assert dropped.max() > 1e-3
    norms = {name: head.tensors[name].double().norm(dim=1).max() for name in ("weight", "update_weight")}
    for name, norm in zip(("hidden", "update_hidden"), norms.values(), strict=True):
        error = (actual[name].double() - exact[name]).norm(dim=1)
        assert error.max() > 1e-4
        assert (error <= dropped * norm + 1e-5 * head.grad.abs() * norm).all()
    bound = result.certificate().dhidden_bound
    assert bound == pytest.approx((dropped.max() * norms["weight"]).item(), rel=1e-5)


@pytest.mark.parametrize("workspace_bytes", [1, 20_000, 60_000])
def test_the_workspace_does_not_change_the_result(workspace_bytes, backend, monkeypatch):
    head = sharp(rank=40, has_bias=True)

    def measure():
        leaves = head.leaves()
        return head.gradients(vars(head.run(leaves, backend, tau=TAU)), leaves)

    whole = measure()
    monkeypatch.setattr(focalkern.logps.function, "WORKSPACE_BYTES", workspace_bytes)
    for name, gradient in measure().items():
        # Each logit is summed anew, in a tile with other rows.
        assert relative_error(gradient, whole[name]) <= head.conditioning() / 10 * EPS, name


# Which gradients come back, and what they cost


@pytest.mark.parametrize("tau", [0.0, TAU], ids=["exact", "certified"])
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
    head = sharp(rank=16, has_bias=True)

    def measure(*names: str) -> dict[str, torch.Tensor | None]:
        leaves = head.leaves(trained=names)
        result = head.run(leaves, backend, tau=tau)
        result.logps.backward(head.grad)
        assert (result.kept_share < 0.4) == (tau > 0)
        return {name: leaf.grad for name, leaf in leaves.items()}

    alone, all_of_them = measure(*trained), measure(*NAMES)
    for name, gradient in alone.items():
        if name in trained:
            assert torch.equal(gradient, all_of_them[name])
        else:
            assert gradient is None


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


@pytest.mark.parametrize("tau", [0.0, TAU], ids=["exact", "certified"])
def test_a_frozen_weight_costs_nothing_of_its_size_and_no_product(tau, backend, one_thread):
    n, rank, hidden_size, vocab_size = 48, 24, 40, 8192
    head = Head(n, rank=rank, hidden_size=hidden_size, vocab_size=vocab_size, sharpness=14.0)

    def measure(*trained):
        leaves = head.leaves(trained=trained)
        with Made() as made:
            result = head.run(leaves, backend, tau=tau)
            result.logps.backward(head.grad.float())
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


def test_nothing_to_train_needs_no_graph(backend):
    head = Head(2, 6)
    assert not head.run(head.leaves(trained=()), backend).logps.requires_grad


def test_a_batch_without_a_completion_token_has_zero_gradients(backend):
    head = Head(2, 5, has_bias=True)
    head.labels.fill_(-100)
    leaves = head.leaves()
    actual = outcome(head, head.run(leaves, backend, outputs=OUTPUTS), leaves)
    assert len(actual) == 10
    assert not any(value.any() for value in actual.values())


# What is not finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", ["update_hidden", "update_weight"])
def test_what_is_not_finite_gives_nan(name, softcap, value, backend):
    head = Head(40, softcap=softcap)
    head.tensors[name][0, 0] = value
    head.labels[0] = 7
    logps = head.run(head.leaves(), backend).logps
    assert logps[0].isnan()
    live = head.labels != -100
    assert logps[live].isnan().all() == (name == "update_weight")


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_masked_positions_take_no_part_whatever_they_hold(garbage, backend):
    head = Head(2, 9)

    def measure(filling: float):
        head.tensors["update_hidden"][head.labels == -100] = filling
        leaves = head.leaves()
        return outcome(head, head.run(leaves, backend, outputs=OUTPUTS), leaves)

    assert_equal(measure(garbage), measure(0.0))


# Autocast


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_autocast_casts_the_update_and_gradients_come_back_in_its_dtype(dtype, backend):
    head = Head(2, 6)
    inside, by_hand = head.leaves(), head.leaves()
    with torch.autocast(DEVICE.type, dtype=dtype):
        result = head.run(inside, backend)
    cast = head.run({name: x.to(dtype) for name, x in by_hand.items()}, backend)
    assert torch.equal(result.logps, cast.logps)
    actual = head.gradients(vars(result), inside)
    assert {x.dtype for x in actual.values()} == {torch.float32}
    assert_equal(actual, head.gradients(vars(cast), by_hand))


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_lora_under_autocast_multiplies_as_a_linear_layer(dtype):
    head = Head(2, 6)
    a = torch.randn(8, 24, device=DEVICE)
    with torch.autocast(DEVICE.type, dtype=dtype):
        update = LowRankUpdate.lora(head.tensors["hidden"], a, head.tensors["update_weight"], 0.5)
    assert update.hidden.dtype == dtype
    assert torch.equal(update.hidden, 0.5 * (head.tensors["hidden"].to(dtype) @ a.to(dtype).T))


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


@pytest.mark.skipif(INTERPRETED, reason="float64 is the torch backend's alone")
def test_float64_is_that_of_a_wider_head():
    head = Head(2, 11, rank=5, dtype=torch.float64, **OPTIONS["all of them"])
    leaves, expected_leaves = head.leaves(), head.leaves()
    actual = outcome(head, head.run(leaves, "torch", outputs=OUTPUTS), leaves)
    expected = outcome(head, head.wide(expected_leaves), expected_leaves)
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype
        assert relative_error(value, expected[name]) < 1e-13, name
