"""`lm_head_logps` of a head module: `linear_logps` of its weight, inside the module's own call."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tolerance import relative_error
from torch import nn

from focalkern import FusedFocalPOLoss, LinearLogps, LowRankUpdate, linear_logps, lm_head_logps

VOCAB, HIDDEN = 300, 32
OUTPUTS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
# Two ways to sum fp32 products.
TOLERANCE = 1e-6


def head(bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(HIDDEN, VOCAB, bias=bias)


def with_lora(linear: nn.Linear, **options) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    model = nn.ModuleDict({"lm_head": linear, "other": nn.Linear(HIDDEN, HIDDEN)})
    options = {"target_modules": ["lm_head"], "init_lora_weights": False, **options}
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **options)).base_model.model[
        "lm_head"
    ]


@pytest.fixture
def hidden() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(4, 9, HIDDEN, generator=generator).mul_(4).requires_grad_()


@pytest.fixture
def labels() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(VOCAB, (4, 9), generator=generator)
    labels[:, :2] = labels[1, 5:] = -100
    return labels


def assert_same(ours: LinearLogps, theirs: LinearLogps, parameters: list[torch.Tensor]) -> None:
    for name in ("logps", *OUTPUTS):
        found, expected = getattr(ours, name), getattr(theirs, name)
        assert (found is None) == (expected is None), name
        if expected is not None:
            assert relative_error(found, expected) <= TOLERANCE, name
    torch.manual_seed(4)
    weights = torch.randn_like(theirs.logps)
    gradients = [
        torch.autograd.grad(
            (weights * x.logps).sum() + (0 if x.entropy is None else x.entropy.sum()), parameters
        )
        for x in (ours, theirs)
    ]
    for actual, expected in zip(*gradients, strict=True):
        assert expected.any()
        assert relative_error(actual, expected) <= TOLERANCE


def test_labels_on_the_host_stay_there(hidden, labels, monkeypatch):
    """Whatever the device of hidden: on one that computes, the forward would wait to look at them."""
    given = []

    def recorded(hidden, weight, labels, *, cu_seqlens, **options):
        given.append((hidden.device.type, labels.device.type, cu_seqlens.device.type))
        return LinearLogps(torch.zeros(labels.shape))

    monkeypatch.setattr("focalkern.lm_head.linear_logps", recorded)
    on_meta, cu_seqlens = hidden[0].to("meta"), torch.tensor([0, 9])
    lm_head_logps(head().to("meta"), on_meta, labels[0], cu_seqlens=cu_seqlens)
    lm_head_logps(head().to("meta"), on_meta, labels[0].to("meta"), cu_seqlens=cu_seqlens.to("meta"))
    assert given == [("meta", "cpu", "cpu"), ("meta", "meta", "meta")]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shift": True, "outputs": OUTPUTS},
        {"temperature": 0.7, "softcap": 20.0, "logit_scale": 0.5, "backward": "exact"},
        {"tau": 1e-3, "ignore_index": -100, "backend": "torch"},
    ],
)
def test_it_is_linear_logps_of_the_modules_weight(bias, options, hidden, labels):
    lm_head = head(bias)
    ours = lm_head_logps(lm_head, hidden, labels, **options)
    theirs = linear_logps(hidden, lm_head.weight, labels, bias=lm_head.bias, **options)
    assert_same(ours, theirs, [hidden, *lm_head.parameters()])


def test_packed_sequences(hidden, labels):
    lm_head, cu_seqlens = head(), torch.tensor([0, 9, 20, 36])
    packed = hidden.flatten(0, 1), labels.flatten()
    ours = lm_head_logps(lm_head, *packed, shift=True, cu_seqlens=cu_seqlens)
    theirs = linear_logps(packed[0], lm_head.weight, packed[1], shift=True, cu_seqlens=cu_seqlens)
    assert_same(ours, theirs, [hidden, lm_head.weight])


def test_lora_is_a_low_rank_update(hidden, labels):
    adapted = with_lora(head())
    weight = adapted.get_base_layer().weight
    a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    ours = lm_head_logps(adapted, hidden, labels)
    theirs = linear_logps(hidden, weight, labels, update=LowRankUpdate.lora(hidden, a, b, scaling=2.0))
    assert_same(ours, theirs, [hidden, a, b])
    assert not weight.requires_grad


def test_a_trained_copy_of_the_head_stands_for_it(hidden, labels):
    copied = with_lora(head(), target_modules=["other"], modules_to_save=["lm_head"])
    weight = copied.modules_to_save["default"].weight
    with torch.no_grad():
        weight.mul_(1.5)
    assert_same(lm_head_logps(copied, hidden, labels), linear_logps(hidden, weight, labels), [hidden, weight])


def test_no_rows_at_all(hidden, labels):
    lm_head = head()
    tokens = lm_head_logps(lm_head, hidden[:0], labels[:0], shift=True)
    assert tokens.logps.shape == (0, 8)
    tokens.logps.sum().backward()
    assert not lm_head.weight.grad.any()
    assert not hidden.grad.any()


def test_the_modules_hooks_fire(hidden, labels):
    lm_head, fired = head(), []

    def post(*_):
        fired.append("post")

    post.__module__ = "deepspeed.runtime"  # foreign ones are left out
    lm_head.register_forward_pre_hook(lambda *_: fired.append("pre"))
    lm_head.register_forward_hook(post)
    lm_head.register_full_backward_pre_hook(lambda *_: fired.append("backward pre"))
    lm_head.register_full_backward_hook(lambda *_: fired.append("backward"))
    tokens = lm_head_logps(lm_head, hidden, labels)
    assert fired == ["pre", "post"]
    tokens.logps.sum().backward()
    assert fired == ["pre", "post", "backward pre", "backward"]
    assert "forward" not in vars(lm_head)
    assert lm_head(hidden).shape == (4, 9, VOCAB)


def test_the_module_is_itself_again_after_an_error(hidden, labels):
    lm_head = head()
    with pytest.raises(ValueError, match="labels must be in"):
        lm_head_logps(lm_head, hidden, labels + VOCAB)
    assert lm_head(hidden).shape == (4, 9, VOCAB)


def test_what_hooks_get_is_no_view(hidden, labels):
    """FSDP2 warns of views."""
    lm_head, outputs = head(), []

    def post(module, args, output):
        outputs.extend(output)

    post.__module__ = "torch.distributed"
    lm_head.register_forward_hook(post)
    lm_head_logps(lm_head, hidden, labels, outputs=("entropy",))
    assert [x._base for x in outputs] == [None, None]


def test_autocast_casts_hidden_and_weight(hidden, labels):
    lm_head = head()
    with torch.autocast("cpu", torch.bfloat16):
        ours = lm_head_logps(lm_head, hidden, labels)
    theirs = linear_logps(hidden.bfloat16(), lm_head.weight.bfloat16(), labels)
    assert ours.logps.dtype == torch.float32
    assert relative_error(ours.logps, theirs.logps) <= TOLERANCE


def test_a_compiled_model(hidden, labels):
    lm_head = head()
    own = lm_head_logps(lm_head, hidden, labels).logps
    compiled = torch.compile(lambda x: lm_head_logps(lm_head, 1.0 * x, labels).logps * 2, backend="eager")
    assert torch.equal(compiled(hidden), 2 * own)


@pytest.mark.parametrize("kind", ["a Sequential", "a quantised layer", "DoRA"])
def test_heads_that_are_no_plain_linear_layers_are_refused(kind, hidden, labels):
    if kind == "a Sequential":
        lm_head, match = nn.Sequential(head()), "torch.nn.Linear.*got Sequential"
    elif kind == "DoRA":
        lm_head, match = with_lora(head(), use_dora=True), "'default' is DoraLinearVariant"
    else:
        lm_head, match = head(), "must not be quantised.*int8"
        lm_head.weight = nn.Parameter(lm_head.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=match):
        lm_head_logps(lm_head, hidden, labels)


def test_a_weight_that_nothing_gathers_is_refused(hidden, labels):
    lm_head = head()
    lm_head.weight.data = torch.zeros(0)
    with pytest.raises(
        ValueError, match=r"weight must be \[V, H\].*got \[0\] \(a parameter sharded by ZeRO-3"
    ):
        lm_head_logps(lm_head, hidden, labels)


def test_peft_is_not_imported_for_a_plain_head():
    code = (
        "import sys, torch, focalkern\n"
        "hidden, labels = torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64)\n"
        "focalkern.lm_head_logps(torch.nn.Linear(8, 130), hidden, labels)\n"
        "print([name for name in ('accelerate', 'peft', 'transformers') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# The certificate, which needs the weight again


def certified(lm_head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor):
    """A backward that leaves something out."""
    with torch.no_grad():
        lm_head.weight.mul_(20.0)
    zeros = torch.zeros(2)
    tokens = lm_head_logps(lm_head, hidden, labels, tau=1e-2)
    out = FusedFocalPOLoss().from_logps(tokens, labels, zeros, zeros)
    out.loss.backward()
    assert out.kept_share < 1
    return out


@pytest.mark.parametrize("how", ["emptied", "without storage"])
def test_the_certificate_of_a_weight_that_is_gone_says_what_to_do(how, hidden, labels):
    """As ZeRO-3 and FSDP2 free it after the backward, and bring it again."""
    lm_head = nn.Linear(HIDDEN, 2000, bias=False)
    out = certified(lm_head, hidden, labels)
    expected, whole = out.certificate(), lm_head.weight.detach().clone()
    if how == "emptied":
        lm_head.weight.data = torch.zeros(0)
    else:
        lm_head.weight.untyped_storage().resize_(0)
    with pytest.raises(
        RuntimeError, match=r"sharded again: call it within deepspeed\.zero\.GatheredParameters"
    ):
        out.certificate()
    if how == "emptied":
        lm_head.weight.data = whole
    else:
        lm_head.weight.untyped_storage().resize_(4 * whole.numel())
        with torch.autograd._unsafe_preserve_version_counter(lm_head.weight), torch.no_grad():
            lm_head.weight.copy_(whole)
    assert out.certificate() == expected


def test_nothing_but_the_parameter_holds_its_storage(hidden, labels):
    lm_head = nn.Linear(HIDDEN, 2000, bias=False)
    out = certified(lm_head, hidden, labels)
    assert out.dropped.weight is lm_head.weight
    tokens = linear_logps(hidden, 2 * lm_head.weight, labels)
    assert not tokens.dropped.weight.requires_grad  # holds no graph
