"""What is refused: the exception, the argument it names, what was expected and what came."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import focalkern.backends
from focalkern import FusedFocalPOLoss, FusedPairLoss, linear_logps
from focalkern.methods import hinge

B, T, H, V = 2, 3, 8, 10


def loss_inputs(**changes) -> dict:
    inputs = {
        "hidden": torch.zeros(2 * B, T, H),
        "weight": torch.zeros(V, H),
        "labels": torch.zeros(2 * B, T, dtype=torch.int64),
        "bias": None,
        "ref_chosen_logps": torch.zeros(B),
        "ref_rejected_logps": torch.zeros(B),
    }
    return {**inputs, **changes}


def packed_inputs(**changes) -> dict:
    inputs = {
        "hidden": torch.zeros(8, H),
        "labels": torch.zeros(8, dtype=torch.int64),
        "cu_seqlens": torch.tensor([0, 2, 4, 6, 8]),
    }
    return loss_inputs(**{**inputs, **changes})


def head_inputs(**changes) -> dict:
    inputs = loss_inputs(**changes)
    return {name: value for name, value in inputs.items() if "ref" not in name}


def assert_refused(call, exception: type[Exception], name: str, expected: str, came: str) -> None:
    with pytest.raises(exception) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(name), message
    says_expected, _, says_came = message.partition("; got ")
    assert expected in says_expected, message
    assert came in says_came, message


def test_the_inputs_that_the_cases_below_spoil_are_accepted():
    assert torch.isfinite(FusedFocalPOLoss()(**loss_inputs()).loss)
    assert torch.isfinite(FusedFocalPOLoss()(**packed_inputs()).loss)
    assert torch.isfinite(linear_logps(**head_inputs()).logps).all()


NUMBERS_OF_WRONG_TYPE = [True, "0.1", None, [0.1], torch.tensor(0.1), 1j]
NOT_FINITE = [math.nan, math.inf, -math.inf]
# name: (values out of range, what the message says of the range)
NUMBERS = {
    "beta": ([0, -0.1], "> 0"),
    "gamma": ([-1e-6], ">= 0"),
    "margin": ([], "finite"),
    "alpha": ([-0.5], ">= 0"),
    "label_smoothing": ([-0.1, 0.51, 1.0], "<= 0.5"),
    "ema_momentum": ([-0.1, 1.0, 1.1], "< 1"),
    "temperature": ([0, -1.0], "> 0"),
    "softcap": ([0, -30.0], "> 0"),
    "logit_scale": ([], "finite"),
    "tau": ([-1e-9], ">= 0"),
}
CHOICES = {
    "modulation": ["FocalPO", "", None, 0],
    "reduction": ["batchmean", None, False],
    "backward": ["approximate", None, True],
    "backend": ["cuda", None, torch.device("cpu")],
    "implicit_reference": ["tdpo", None, 0],
}
FLAGS = ["reference_free", "length_normalize", "ema_bias_correction", "normalize_margin", "stop_gradient"]
HEAD_OPTIONS = {"ignore_index", "temperature", "softcap", "logit_scale", "backward", "tau", "backend"}


def bad_options() -> list:
    cases = []
    for name, (out_of_range, bound) in NUMBERS.items():
        cases += [(name, value, ValueError, bound, repr(value)) for value in out_of_range]
        finite = "finite"
        cases += [(name, value, ValueError, finite, repr(value)) for value in NOT_FINITE]
        wrong = [x for x in NUMBERS_OF_WRONG_TYPE if not (name == "softcap" and x is None)]
        wrong = [x for x in wrong if not (name == "tau" and isinstance(x, str))]
        cases += [(name, value, TypeError, "number", type(value).__name__) for value in wrong]
    for name, values in CHOICES.items():
        cases += [(name, value, ValueError, "one of '", repr(value)) for value in values]
    for name in FLAGS:
        cases += [(name, value, TypeError, "True or False", repr(value)) for value in (1, None, "yes")]
    cases += [
        ("ignore_index", value, TypeError, "int", repr(value)) for value in (True, -100.0, None, "-100")
    ]
    cases += [("tau", "automatic", ValueError, "'auto'", "'automatic'")]
    return [pytest.param(*case, id=f"{case[0]}={case[1]!r}") for case in cases]


@pytest.mark.parametrize(("name", "value", "exception", "expected", "came"), bad_options())
def test_an_option_outside_its_domain_is_refused(name, value, exception, expected, came):
    assert_refused(lambda: FusedFocalPOLoss(**{name: value}), exception, name, expected, came)
    if name in HEAD_OPTIONS:
        assert_refused(
            lambda: linear_logps(**head_inputs(), **{name: value}), exception, name, expected, came
        )


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": 0},
        {"gamma": 3.0},
        {"label_smoothing": 0.5},
        {"tau": 0.0},
        {"softcap": None},
        {"margin": -1.0},
        {"ema_momentum": 0.0},
        {"ignore_index": 0},
        {"alpha": 0.0},
    ],
    ids=str,
)
def test_the_edge_of_an_option_s_domain_is_accepted(options):
    FusedFocalPOLoss(**options)


@pytest.mark.parametrize("options", [{"gama": 0.05}, {"loss_type": "ipo"}], ids=str)
def test_an_unknown_option_is_refused(options):
    with pytest.raises(TypeError, match=next(iter(options))):
        FusedFocalPOLoss(**options)
    with pytest.raises(TypeError, match=next(iter(options))):
        FusedFocalPOLoss.simpo(**options)


@pytest.mark.parametrize(
    ("outputs", "exception", "came"),
    [
        (("entropy", "logits"), ValueError, "'logits'"),
        ("perplexity", ValueError, "'perplexity'"),
        ((1,), ValueError, "1"),
        (None, TypeError, "NoneType"),
        (5, TypeError, "int"),
    ],
)
def test_an_unknown_output_is_refused(outputs, exception, came):
    call = lambda: linear_logps(**head_inputs(), outputs=outputs)  # noqa: E731
    assert_refused(
        call, exception, "outputs", "'entropy', 'mean_logits', 'is_top1', 'log_sum_sq_probs'", came
    )


def on_meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device="meta")


# Bad tensors, refused by both functions: what changes, and what is said of the first.
HEAD_CASES = {
    "hidden is a list": ({"hidden": [[0.0]]}, TypeError, "torch.Tensor", "list"),
    "hidden is int": ({"hidden": torch.zeros(2 * B, T, H, dtype=torch.int32)}, TypeError, "float32", "int32"),
    "hidden is complex": (
        {"hidden": torch.zeros(2 * B, T, H, dtype=torch.complex64)},
        TypeError,
        "float32",
        "complex64",
    ),
    "hidden has one dimension": ({"hidden": torch.zeros(H)}, ValueError, "[..., H]", "[8]"),
    "hidden has another width": (
        {"hidden": torch.zeros(2 * B, T, H + 1)},
        ValueError,
        "H = 8, the width of weight",
        "[4, 3, 9]",
    ),
    "weight is None": ({"weight": None}, TypeError, "torch.Tensor", "NoneType"),
    "weight is int": ({"weight": torch.zeros(V, H, dtype=torch.int8)}, TypeError, "float32", "int8"),
    "weight is a vector": ({"weight": torch.zeros(H)}, ValueError, "[V, H]", "[8]"),
    "weight is empty": ({"weight": torch.zeros(0, H)}, ValueError, "[V, H] with V, H > 0", "[0, 8]"),
    "weight is a flat empty shard": ({"weight": torch.zeros(0)}, ValueError, "[V, H]", "gather it first"),
    "weight has another dtype": (
        {"weight": torch.zeros(V, H, dtype=torch.bfloat16)},
        TypeError,
        "dtype of hidden, torch.float32",
        "bfloat16",
    ),
    "weight on another device": ({"weight": on_meta(V, H)}, ValueError, "device of hidden, cpu", "meta"),
    "bias is a number": ({"bias": 0.0}, TypeError, "torch.Tensor", "float"),
    "bias has another length": ({"bias": torch.zeros(V + 1)}, ValueError, "[V] = [10]", "[11]"),
    "bias is a matrix": ({"bias": torch.zeros(V, 1)}, ValueError, "[V] = [10]", "[10, 1]"),
    "bias has another dtype": (
        {"bias": torch.zeros(V, dtype=torch.float64)},
        TypeError,
        "dtype of weight, torch.float32",
        "float64",
    ),
    "bias on another device": ({"bias": on_meta(V)}, ValueError, "device of hidden, cpu", "meta"),
    "labels is a list": ({"labels": [[0]]}, TypeError, "torch.Tensor", "list"),
    "labels is float": ({"labels": torch.zeros(2 * B, T)}, TypeError, "int64 or int32", "float32"),
    "labels is uint8": (
        {"labels": torch.zeros(2 * B, T, dtype=torch.uint8)},
        TypeError,
        "int64 or int32",
        "uint8",
    ),
    "labels has another shape": (
        {"labels": torch.zeros(2 * B, T - 1, dtype=torch.int64)},
        ValueError,
        "[4, 3], the shape of hidden without its last dimension",
        "[4, 2]",
    ),
    "labels is flat": (
        {"labels": torch.zeros(2 * B * T, dtype=torch.int64)},
        ValueError,
        "[4, 3]",
        "[12]",
    ),
    "labels on another device": (
        {"labels": on_meta(2 * B, T, dtype=torch.int64)},
        ValueError,
        "device of hidden, cpu",
        "meta",
    ),
    "shift is a number": ({"shift": 1}, TypeError, "True or False", "1"),
}


@pytest.mark.parametrize("case", HEAD_CASES)
@pytest.mark.parametrize("function", ["linear_logps", "FusedFocalPOLoss"])
def test_a_bad_tensor_is_refused_by_name(function, case):
    changes, exception, expected, came = HEAD_CASES[case]
    name = next(iter(changes))
    if function == "linear_logps":
        assert_refused(lambda: linear_logps(**head_inputs(**changes)), exception, name, expected, came)
    else:
        assert_refused(lambda: FusedFocalPOLoss()(**loss_inputs(**changes)), exception, name, expected, came)


PAIR_CASES = {
    "hidden holds an odd number of sequences": (
        loss_inputs(hidden=torch.zeros(3, T, H), labels=torch.zeros(3, T, dtype=torch.int64)),
        ("hidden", ValueError, "even number of sequences", "[3, 3, 8]"),
    ),
    "hidden holds no sequence": (
        loss_inputs(hidden=torch.zeros(0, T, H), labels=torch.zeros(0, T, dtype=torch.int64)),
        ("hidden", ValueError, "even number of sequences", "[0, 3, 8]"),
    ),
    "hidden has no position to shift": (
        loss_inputs(hidden=torch.zeros(4, 0, H), labels=torch.zeros(4, 0, dtype=torch.int64), shift=True),
        ("hidden", ValueError, "T > 0 positions to shift", "[4, 0, 8]"),
    ),
    "hidden is packed without cu_seqlens": (
        packed_inputs(cu_seqlens=None),
        ("hidden", ValueError, "[2B, T, H], or [N, H] with cu_seqlens", "[8, 8]"),
    ),
    "hidden is padded with cu_seqlens": (
        loss_inputs(cu_seqlens=torch.tensor([0, 3, 6, 9, 12])),
        ("hidden", ValueError, "[N, H] when cu_seqlens is given", "[4, 3, 8]"),
    ),
    "cu_seqlens decreases": (
        packed_inputs(cu_seqlens=torch.tensor([0, 4, 2, 6, 8])),
        ("cu_seqlens", ValueError, "never decrease", "[0, 4, 2, 6, 8]"),
    ),
    "cu_seqlens starts after 0": (
        packed_inputs(cu_seqlens=torch.tensor([1, 2, 4, 6, 8])),
        ("cu_seqlens", ValueError, "start at 0", "[1, 2, 4, 6, 8]"),
    ),
    "cu_seqlens ends before N": (
        packed_inputs(cu_seqlens=torch.tensor([0, 2, 4, 6, 7])),
        ("cu_seqlens", ValueError, "end at N = 8", "[0, 2, 4, 6, 7]"),
    ),
    "cu_seqlens ends after N": (
        packed_inputs(cu_seqlens=torch.tensor([0, 2, 4, 6, 9])),
        ("cu_seqlens", ValueError, "end at N = 8", "[0, 2, 4, 6, 9]"),
    ),
    "cu_seqlens is float": (
        packed_inputs(cu_seqlens=torch.tensor([0.0, 2.0, 4.0, 6.0, 8.0])),
        ("cu_seqlens", TypeError, "int64 or int32", "float32"),
    ),
    "cu_seqlens is a list": (
        packed_inputs(cu_seqlens=[0, 2, 4, 6, 8]),
        ("cu_seqlens", TypeError, "torch.Tensor", "list"),
    ),
    "cu_seqlens holds an odd number of sequences": (
        packed_inputs(cu_seqlens=torch.tensor([0, 2, 4, 8])),
        ("cu_seqlens", ValueError, "[2B + 1]", "[4]"),
    ),
    "cu_seqlens holds no sequence": (
        packed_inputs(cu_seqlens=torch.tensor([0])),
        ("cu_seqlens", ValueError, "[2B + 1]", "[1]"),
    ),
    "cu_seqlens is a matrix": (
        packed_inputs(cu_seqlens=torch.tensor([[0, 2, 4, 6, 8]])),
        ("cu_seqlens", ValueError, "[2B + 1]", "[1, 5]"),
    ),
    "cu_seqlens on another device": (
        packed_inputs(cu_seqlens=on_meta(5, dtype=torch.int64)),
        ("cu_seqlens", ValueError, "device of hidden, cpu", "meta"),
    ),
}
for _name in ("ref_chosen_logps", "ref_rejected_logps"):
    PAIR_CASES |= {
        f"{_name} is missing": (
            loss_inputs(**{_name: None}),
            (_name, ValueError, "[B] = [2] sums over completion tokens", "None"),
        ),
        f"{_name} is a list": (
            loss_inputs(**{_name: [0.0, 0.0]}),
            (_name, TypeError, "torch.Tensor", "list"),
        ),
        f"{_name} is of both sequences": (
            loss_inputs(**{_name: torch.zeros(2 * B)}),
            (_name, ValueError, "[B] = [2]", "[4]"),
        ),
        f"{_name} is a column": (
            loss_inputs(**{_name: torch.zeros(B, 1)}),
            (_name, ValueError, "[B] = [2]", "[2, 1]"),
        ),
        f"{_name} is int": (
            loss_inputs(**{_name: torch.zeros(B, dtype=torch.int64)}),
            (_name, TypeError, "floating point", "int64"),
        ),
        f"{_name} requires grad": (
            loss_inputs(**{_name: torch.zeros(B, requires_grad=True)}),
            (_name, ValueError, "constant", "requires grad"),
        ),
        f"{_name} on another device": (
            loss_inputs(**{_name: on_meta(B)}),
            (_name, ValueError, "device of hidden, cpu", "meta"),
        ),
    }


@pytest.mark.parametrize("case", PAIR_CASES)
def test_a_bad_batch_of_pairs_is_refused_by_name(case):
    inputs, (name, exception, expected, came) = PAIR_CASES[case]
    assert_refused(lambda: FusedFocalPOLoss()(**inputs), exception, name, expected, came)


def test_linear_logps_refuses_to_shift_a_sequence_without_positions():
    inputs = head_inputs(hidden=torch.zeros(4, 0, H), labels=torch.zeros(4, 0, dtype=torch.int64), shift=True)
    assert_refused(lambda: linear_logps(**inputs), ValueError, "labels", "at least one position", "[4, 0]")


def test_reference_log_probs_may_be_missing_when_reference_free():
    FusedFocalPOLoss(reference_free=True)(**loss_inputs(ref_chosen_logps=None, ref_rejected_logps=None))


@pytest.mark.parametrize("bad", [V, V + 1000, -1, -101, 2**40])
@pytest.mark.parametrize("shift", [False, True])
class TestLabelOutOfRange:
    """Names the position in the (shifted) labels, and the value."""

    def test_in_a_padded_batch(self, bad, shift):
        labels = torch.zeros(2 * B, T, dtype=torch.int64)
        labels[1, 2] = bad
        expected = "in [0, 10) or ignore_index = -100"
        came = f"{bad} at position [1, {1 if shift else 2}]"
        inputs = {"labels": labels, "shift": shift}
        for call in (
            lambda: FusedFocalPOLoss()(**loss_inputs(**inputs)),
            lambda: linear_logps(**head_inputs(**inputs)),
        ):
            assert_refused(call, ValueError, "labels", expected, came)

    def test_in_a_packed_batch(self, bad, shift):
        labels = torch.zeros(8, dtype=torch.int64)
        labels[3] = bad
        call = lambda: FusedFocalPOLoss()(**packed_inputs(labels=labels, shift=shift))  # noqa: E731
        assert_refused(call, ValueError, "labels", "in [0, 10)", f"{bad} at position [{2 if shift else 3}]")


def test_minus_100_is_out_of_range_when_ignore_index_is_another():
    labels = torch.full((2 * B, T), -100)
    call = lambda: linear_logps(**head_inputs(labels=labels), ignore_index=0)  # noqa: E731
    assert_refused(call, ValueError, "labels", "ignore_index = 0", "-100 at position [0, 0]")


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_sequence_without_completion_cannot_be_length_normalised(packed):
    inputs = packed_inputs() if packed else loss_inputs()
    labels = inputs["labels"].view(2 * B, -1).clone()
    labels[[0, 3]] = -100
    inputs["labels"] = labels.view(inputs["labels"].shape)
    assert torch.isfinite(FusedFocalPOLoss()(**inputs).loss)
    call = lambda: FusedFocalPOLoss(length_normalize=True)(**inputs)  # noqa: E731
    assert_refused(call, ValueError, "labels", "at least one completion token", "sequences [0, 3]")


def test_an_empty_packed_sequence_cannot_be_length_normalised():
    inputs = packed_inputs(cu_seqlens=torch.tensor([0, 2, 2, 6, 8]))
    call = lambda: FusedFocalPOLoss(length_normalize=True)(**inputs)  # noqa: E731
    assert_refused(call, ValueError, "labels", "at least one completion token", "sequences [1]")


class TestTritonBackendRefuses:
    """With the reason, and the way out."""

    @staticmethod
    def assert_refused(dtype: torch.dtype, reason: str) -> None:
        def cast(inputs: dict) -> dict:
            return {**inputs, "hidden": inputs["hidden"].to(dtype), "weight": inputs["weight"].to(dtype)}

        message = rf"^backend='triton' .*{reason}.*use backend='torch'"
        with pytest.raises(ValueError, match=message):
            FusedFocalPOLoss(backend="triton")(**cast(loss_inputs()))
        with pytest.raises(ValueError, match=message):
            linear_logps(**cast(head_inputs()), backend="triton")

    def test_float64(self):
        pytest.importorskip("triton")
        self.assert_refused(torch.float64, "float32, float16 or bfloat16 hidden; got float64")

    def test_the_cpu_without_the_interpreter(self, monkeypatch):
        pytest.importorskip("triton")
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        self.assert_refused(torch.float32, "CUDA device; got cpu")

    def test_a_machine_without_triton(self, monkeypatch):
        monkeypatch.setattr(focalkern.backends, "HAS_TRITON", False)
        self.assert_refused(torch.float32, "not installed")


def test_auto_takes_the_torch_backend_where_triton_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert focalkern.backends.select_backend("auto", torch.zeros(1)) == "torch"
    double = torch.zeros(1, dtype=torch.float64)
    assert focalkern.backends.select_backend("auto", double) == "torch"


@pytest.mark.parametrize("loss", [FusedFocalPOLoss(reference_free=True), linear_logps], ids=["loss", "logps"])
def test_what_is_easily_mistaken_for_the_arguments_is_recognised(loss):
    hidden, weight = torch.randn(2, 4, 8), torch.nn.Linear(8, 20)
    labels = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"^weight must be a torch.Tensor; got Linear: take its .weight"):
        loss(hidden, weight, labels)
    output = SimpleNamespace(last_hidden_state=hidden)
    with pytest.raises(TypeError, match=r"^hidden must be a torch.Tensor; .*: take its .last_hidden_state"):
        loss(output, weight.weight, labels)
    for mistaken in ((weight(hidden), weight.weight), (hidden, weight.weight.T)):
        with pytest.raises(ValueError, match=r"^hidden must be .* \(logits, or a transposed weight\?\)"):
            loss(*mistaken, labels)


def test_gamma_of_another_type_is_told_what_it_can_be():
    with pytest.raises(TypeError, match=r"^gamma must be a number or a GammaSchedule; got str 'cosine'"):
        FusedFocalPOLoss(gamma="cosine")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss_fn", [FusedFocalPOLoss(), FusedPairLoss(hinge)], ids=["focal", "pair"])
def test_sums_of_log_probs_in_16_bits_are_warned_of(loss_fn, dtype):
    with pytest.warns(
        UserWarning, match=rf"^ref_rejected_logps is {dtype}, in which a sum of log-probs is off"
    ) as warned:
        loss_fn(**loss_inputs(ref_rejected_logps=torch.zeros(B, dtype=dtype)))
    assert [warning.filename for warning in warned] == [__file__]
