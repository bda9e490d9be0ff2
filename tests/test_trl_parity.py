"""Every loss against TRL's own trainers on one batch: value, metrics and the gradient of every parameter.

The trainers are real and so are their batches; the model is a Llama of random weights, in fp32 on the CPU.
"""

from __future__ import annotations

from copy import copy, deepcopy
from functools import partial

import pytest
import torch

pytest.importorskip("trl")

from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl_tiny import RECORDS as ALL_RECORDS
from trl_tiny import VOCAB, focal_trainer, llama, near, random_model, seeded, settings, trainer_of

from focalkern import FusedPairLoss, methods
from focalkern.pairs.pair_loss import Pairs
from focalkern.trl.loss_types import LOSS_TYPES
from focalkern.trl.mixed_loss import MixedLoss

RECORDS = [ALL_RECORDS[i] for i in (0, 2, 5, 6)]  # the short ones
PAIRS = len(RECORDS)
# Sums of log-probs of up to 150 nats in fp32: two kernels differ by an ulp of that, 1.5e-5. Times β, at most
# 0.5, it is what u and with it log σ'(u) is off by.
RTOL = 1e-5


def with_batch(trainer):
    trainer.batch = next(iter(trainer.get_train_dataloader()))
    return trainer


def of_trl(trainer_class, config_class, folder, *models, **changes):
    args = config_class(**settings(folder, per_device_train_batch_size=2 * PAIRS, **changes))
    return with_batch(trainer_of(args, *models, trainer_class=trainer_class, records=RECORDS))


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return dict(zip([name for name, _ in model.named_parameters()], found, strict=True))


def assert_same_training(loss, model, expected, their_model, rtol=RTOL) -> None:
    """Value, and the gradient of every parameter, relative to its size."""
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=0)
    ours, theirs = gradients(loss, model), gradients(expected, their_model)
    assert theirs["lm_head.weight"].any()
    assert theirs["model.layers.0.mlp.up_proj.weight"].any()
    for name in theirs:
        difference, size = (ours[name] - theirs[name]).norm(), theirs[name].norm()
        assert difference <= rtol * size, f"{name}: off by {difference / size:.1e}"


def hidden_states(model, input_ids, attention_mask) -> torch.Tensor:
    return model.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


# DPOTrainer, and FocalPOTrainer with its loss types


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """TRL's and ours, of the same weights, whose heads return whatever a loss takes."""
    folder = tmp_path_factory.mktemp("dpo")
    model = seeded(llama)
    theirs = of_trl(DPOTrainer, DPOConfig, folder, deepcopy(model), near(model), use_weighting=True)
    ours = focal_trainer(folder, model, near(model), loss_type=["sigmoid"], use_weighting=True)
    return theirs, ours


DEFAULTS = {
    "loss_types": ["sigmoid"],
    "loss_weights": [1.0],
    "beta": 0.1,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "ld_alpha": None,
    "use_weighting": False,
}


def their_loss(trainer, loss_type, loss_weights=None, **options) -> torch.Tensor:
    trainer.args.discopop_tau = options.pop("discopop_tau", 0.05)
    weights = loss_weights or [1.0] * len(loss_type)
    for name, value in {**DEFAULTS, "loss_types": loss_type, "loss_weights": weights, **options}.items():
        assert hasattr(trainer, name)
        setattr(trainer, name, value)
    return trainer.compute_loss(trainer.model, trainer.batch)


def our_loss(trainer, batch, **options) -> torch.Tensor:
    args = copy(trainer.args)  # making a new one would reset what accelerate knows of the process
    vars(args).update({"use_weighting": False, **options})
    trainer.loss_fn = MixedLoss(args)
    return trainer.compute_loss(trainer.model, batch)


def logged(trainer) -> dict[str, float]:
    metrics = {name: float(values[-1]) for name, values in trainer._metrics["train"].items()}
    del metrics["num_tokens"]  # of all that was computed so far
    trainer._metrics["train"].clear()
    return metrics


def test_the_batch_tells_losses_apart(trainers, monkeypatch):
    """Unequal lengths, log-ratios of both signs and of some size."""
    theirs, ours = trainers
    lengths = theirs.batch["completion_mask"].sum(-1)
    assert (lengths[:PAIRS] < lengths[PAIRS:]).any()
    assert (lengths[:PAIRS] > lengths[PAIRS:]).any()
    seen = []
    monkeypatch.setitem(LOSS_TYPES, "sigmoid", lambda pairs: seen.append(pairs) or methods.dpo(pairs))
    our_loss(ours, theirs.batch, loss_type=["sigmoid"])
    ratios = torch.cat([seen[0].chosen_log_ratios, seen[0].rejected_log_ratios])
    assert ratios.min() < -0.3
    assert ratios.max() > 0.3
    assert ratios.abs().max() < 20


SINGLE = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 0.2},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {"label_smoothing": 0.2},
    "aot_unpaired": {"label_smoothing": 0.2},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.5},
    "sft": {},
    "sigmoid_norm": {},
}
DIVERGENCES = [
    ("sigmoid", "forward_kl", None),
    ("sigmoid", "js_divergence", None),
    ("sigmoid", "alpha_divergence", 0.0),
    ("sigmoid", "alpha_divergence", 0.5),
    ("sigmoid", "alpha_divergence", 1.0),
    ("sigmoid", "alpha_divergence", 1.5),
    ("ipo", "js_divergence", None),
    ("sigmoid_norm", "alpha_divergence", 0.3),
    ("hinge", "forward_kl", None),
]
LOSSES = {
    **{name: {"loss_type": [name], "beta": 0.25, **more} for name, more in SINGLE.items()},
    **{f"{name}, not smoothed": {"loss_type": [name]} for name in ("aot", "aot_unpaired")},
    **{
        f"{name}, {divergence} {alpha or ''}": {"loss_type": [name], "f_divergence_type": divergence}
        | ({} if alpha is None else {"f_alpha_divergence_coef": alpha})
        for name, divergence, alpha in DIVERGENCES
    },
    **{
        f"{name}, ld_alpha {ld_alpha}": {"loss_type": [name], "ld_alpha": ld_alpha}
        for name in ("sigmoid", "ipo", "sft", "nca_pair")
        for ld_alpha in (0.0, 0.5, 1.0)
    },
    **{
        f"{name}, WPO": {"loss_type": [name], "use_weighting": True}
        for name in ("sigmoid", "ipo", "bco_pair")
    },
    "MPO": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.5]},
    # With "sft" among them TRL writes to an expanded tensor, which PyTorch refuses.
    "MPO, WPO": {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2], "use_weighting": True},
    "no weights": {"loss_type": ["aot", "ipo"]},
    "divergence and sft": {"loss_type": ["sigmoid_norm", "sft"], "f_divergence_type": "js_divergence"},
}


def test_every_loss_type_of_trl_is_compared(trainers):
    with pytest.raises(ValueError, match="Should be one of") as caught:
        their_loss(trainers[0], ["none"])
    known = str(caught.value).split("Should be one of")[1]
    assert known.count("'") == 2 * len(SINGLE)
    assert all(f"'{name}'" in known for name in SINGLE)


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_every_loss_of_the_dpo_trainer(options, trainers):
    theirs, ours = trainers
    expected, loss = their_loss(theirs, **options), our_loss(ours, theirs.batch, **options)
    # f′(t) = 1 − 1/t and powers of t: a log-ratio off by δ puts the score off by t·δ.
    rtol = 2 * RTOL if "f_divergence_type" in options else RTOL
    assert_same_training(loss, ours.model, expected, theirs.model, rtol)
    assert logged(ours) == pytest.approx(logged(theirs), rel=RTOL, abs=RTOL)


@pytest.mark.parametrize(
    "mixture",
    [
        {"loss_type": ["sigmoid"], "beta": 0.3},
        {"loss_type": ["sigmoid", "ipo", "sft"], "loss_weights": [0.7, 0.1, 2.0]},
    ],
    ids=["alone", "in a mixture"],
)
def test_the_focal_loss_without_gamma_is_dpo(mixture, trainers):
    theirs, ours = trainers
    focal = {**mixture, "loss_type": ["focalpo", *mixture["loss_type"][1:]], "gamma": 0.0}
    expected, loss = their_loss(theirs, **mixture), our_loss(ours, theirs.batch, **focal)
    assert_same_training(loss, ours.model, expected, theirs.model)


# KTOTrainer


@pytest.fixture(scope="module", params=[(10, 15), (15, 10)], ids=["", "KL cut off at 0"])
def kto_trainer(request, tmp_path_factory):
    """The completions are random to both models: the sharper finds them less likely. Hence the KL's sign."""
    sharpness, ref_sharpness = request.param
    model, ref = (random_model(vocab_size=VOCAB, sharpness=x) for x in request.param)
    trainer = of_trl(KTOTrainer, KTOConfig, tmp_path_factory.mktemp("kto"), near(model), ref)
    trainer.has_kl = sharpness < ref_sharpness
    return trainer


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.33, 0.5)])
def test_kto(weights, kto_trainer):
    batch, model, ref = kto_trainer.batch, kto_trainer.model, kto_trainer.ref_model
    kto_trainer.beta = 0.5
    kto_trainer.desirable_weight, kto_trainer.undesirable_weight = weights
    expected = kto_trainer.compute_loss(model, batch)

    def sums(prefix: str, of: torch.nn.Module, order: torch.Tensor) -> dict[str, torch.Tensor]:
        ids, attention, completion = (
            batch[f"{prefix}{name}"][order] for name in ("input_ids", "attention_mask", "completion_mask")
        )
        return {
            "hidden": hidden_states(of, ids, attention),
            "weight": of.lm_head.weight,
            "labels": ids.masked_fill(completion == 0, -100),
            "shift": True,
        }

    function = partial(methods.kto, desirable_weight=weights[0], undesirable_weight=weights[1])
    loss_fn = FusedPairLoss(function, beta=0.5)
    order = torch.argsort(batch["label"].int(), descending=True, stable=True)
    assert batch["label"].sum() == PAIRS
    with torch.no_grad():
        kl_logps, ref_kl_logps = (
            torch.cat(loss_fn.reference_logps(**sums("KL_", of, order))) for of in (model, ref)
        )
        ref_chosen_logps, ref_rejected_logps = loss_fn.reference_logps(**sums("", ref, order))
    kl = methods.kto_kl(kl_logps, ref_kl_logps)
    assert bool(kl > 0) == kto_trainer.has_kl
    refs = {"ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps}
    out = loss_fn(**sums("", model, order), **refs, kl=kl)
    assert_same_training(out.loss, model, expected, model)


# CPOTrainer, ORPOTrainer


@pytest.fixture(scope="module")
def cpo_trainer(tmp_path_factory):
    return of_trl(CPOTrainer, CPOConfig, tmp_path_factory.mktemp("cpo"), seeded(llama), max_length=60)


@pytest.fixture(scope="module")
def orpo_trainer(tmp_path_factory):
    return of_trl(ORPOTrainer, ORPOConfig, tmp_path_factory.mktemp("orpo"), seeded(llama), max_length=60)


def our_reference_free_loss(trainer, loss_fn) -> torch.Tensor:
    batch = trainer.concatenated_inputs(trainer.batch, padding_value=trainer.processing_class.pad_token_id)
    ids, attention, labels = (
        batch[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels")
    )
    hidden = hidden_states(trainer.model, ids, attention)
    return loss_fn(hidden, trainer.model.lm_head.weight, labels, shift=True).loss


def simpo(pairs: Pairs) -> torch.Tensor:
    margin = pairs.beta * (pairs.chosen_mean_logps - pairs.rejected_mean_logps) - 0.5
    return -logsigmoid(margin) + 0.7 * methods.sft(pairs)


CPO_CASES = {
    "sigmoid": (methods.cpo, {"loss_type": "sigmoid"}),
    "smoothed": (
        partial(methods.cpo, label_smoothing=0.2, nll_weight=0.3),
        {"loss_type": "sigmoid", "label_smoothing": 0.2, "cpo_alpha": 0.3},
    ),
    "no NLL": (partial(methods.cpo, nll_weight=0.0), {"loss_type": "sigmoid", "cpo_alpha": 0.0}),
    "hinge is SLiC": (
        methods.weighted_sum((partial(methods.slic_hf, margin=100.0, regularization=0.0), 0.01)),
        {"loss_type": "hinge", "beta": 0.01, "cpo_alpha": 0.0},
    ),
    "CPO-SimPO": (simpo, {"loss_type": "simpo", "simpo_gamma": 0.5, "cpo_alpha": 0.7}),
}


@pytest.mark.parametrize(("function", "options"), CPO_CASES.values(), ids=CPO_CASES)
def test_cpo(function, options, cpo_trainer):
    defaults = {"beta": 0.1, "label_smoothing": 0.0, "cpo_alpha": 1.0, "simpo_gamma": 0.5, "alpha": 0.0}
    for name, value in {**defaults, **options}.items():
        setattr(cpo_trainer, name, value)
    model = cpo_trainer.model
    expected, _ = cpo_trainer.get_batch_loss_metrics(model, cpo_trainer.batch)
    loss = our_reference_free_loss(cpo_trainer, FusedPairLoss(function, beta=cpo_trainer.beta))
    assert_same_training(loss, model, expected, model)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo(beta, orpo_trainer):
    model, batch = orpo_trainer.model, orpo_trainer.batch
    orpo_trainer.beta = beta
    expected, _ = orpo_trainer.get_batch_loss_metrics(model, batch)
    *_, nll_with_prompt = orpo_trainer.concatenated_forward(model, batch)
    ours = our_reference_free_loss(orpo_trainer, FusedPairLoss(methods.orpo, beta=beta))
    nll = our_reference_free_loss(orpo_trainer, FusedPairLoss(methods.sft))
    # Theirs has the NLL of prompt and completion, ours, as the paper, that of the completion.
    assert not torch.allclose(nll_with_prompt, nll, rtol=1e-3)
    assert_same_training(ours - nll + nll_with_prompt, model, expected, model)
