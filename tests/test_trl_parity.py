"""Our losses against TRL's own trainers: the same model, the same batch, `compute_loss` and every gradient.

The trainers are real and so are their batches; the model is a Llama of random weights, in fp32 on the CPU.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset, disable_progress_bars
from tiny import TINY
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl_tiny import tokenizer_of

from focalkern import FusedFocalPOLoss, FusedPairLoss, methods
from focalkern.pairs.pair_loss import Pairs

THINGS = {"sky": "blue", "sea": "green", "door": "brown", "hat": "red", "old stone house": "grey"}
RECORDS = [
    {
        "prompt": f"The {thing} is",
        "chosen": f" {colour}." * (3 * (i % 3) + 1),
        "rejected": f" not {colour}, no." * (1 + i % 2),
    }
    for i, (thing, colour) in enumerate(THINGS.items())
]
PAIRS = len(RECORDS)
# Sums of log-probs of up to 150 nats in fp32: two kernels differ by an ulp of that, 1.5e-5. Times β, at most
# 0.5, it is what u and with it log σ'(u) is off by.
RTOL = 1e-5


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(RECORDS)


def llama(tokenizer, perturbation: float = 0.0, sharpness: float = 20.0) -> LlamaForCausalLM:
    """Random weights of some size; `perturbation` makes another model that is near."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **{**TINY, "num_hidden_layers": 2}))
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
        for parameter in model.parameters():
            parameter.add_(perturbation * torch.randn_like(parameter) * parameter.abs().mean())
    return model


def arguments(folder) -> dict:
    return {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 2 * PAIRS,
        "max_length": None,
    }


def built(trainer_class, *models, args, tokenizer):
    disable_progress_bars()
    return trainer_class(
        *models, args=args, train_dataset=Dataset.from_list(RECORDS), processing_class=tokenizer
    )


def gradients(loss: torch.Tensor, model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return dict(zip([name for name, _ in model.named_parameters()], found, strict=True))


def assert_same_training(
    loss: torch.Tensor, expected: torch.Tensor, model: LlamaForCausalLM, rtol=RTOL
) -> None:
    """Value, and the gradient of every parameter, relative to the size of the gradient of all."""
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=0)
    ours, theirs = gradients(loss, model), gradients(expected, model)
    assert theirs["lm_head.weight"].any()
    assert theirs["model.layers.0.mlp.up_proj.weight"].any()
    for name in theirs:
        difference, size = (ours[name] - theirs[name]).norm(), theirs[name].norm()
        assert difference <= rtol * size, f"{name}: off by {difference / size:.1e}"


def hidden_states(model, input_ids, attention_mask) -> torch.Tensor:
    return model.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


# DPOTrainer


@pytest.fixture(scope="module")
def dpo_trainer(tokenizer, tmp_path_factory):
    args = DPOConfig(use_weighting=True, **arguments(tmp_path_factory.mktemp("dpo")))
    trainer = built(DPOTrainer, llama(tokenizer), llama(tokenizer, 0.3), args=args, tokenizer=tokenizer)
    trainer.batch = next(iter(trainer.get_train_dataloader()))
    return trainer


DPO_SETTINGS = {
    "loss_types": ["sigmoid"],
    "loss_weights": [1.0],
    "beta": 0.1,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "ld_alpha": None,
    "use_weighting": False,
}


def trl_loss(trainer, **settings) -> torch.Tensor:
    for name, value in {**DPO_SETTINGS, **settings}.items():
        assert hasattr(trainer, name)
        setattr(trainer, name, value)
    return trainer.compute_loss(trainer.model, trainer.batch)


def our_loss(trainer, loss_fn) -> torch.Tensor:
    """From the hidden states of the trainer's model and of its reference."""
    batch = trainer.batch
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = (batch["input_ids"], batch["attention_mask"])
    ref, model = trainer.ref_model, trainer.model
    with torch.no_grad():
        refs = loss_fn.reference_logps(hidden_states(ref, *inputs), ref.lm_head.weight, labels, shift=True)
    out = loss_fn(hidden_states(model, *inputs), model.lm_head.weight, labels, None, *refs, shift=True)
    return out.loss


def test_the_batch_tells_losses_apart(dpo_trainer):
    """Unequal lengths, log-ratios of both signs and of some size."""
    lengths = dpo_trainer.batch["completion_mask"].sum(-1)
    assert (lengths[:PAIRS] < lengths[PAIRS:]).any()
    assert (lengths[:PAIRS] > lengths[PAIRS:]).any()
    seen = []
    our_loss(dpo_trainer, FusedPairLoss(lambda pairs: seen.append(pairs) or methods.dpo(pairs)))
    ratios = torch.cat([seen[0].chosen_log_ratios, seen[0].rejected_log_ratios])
    assert ratios.min() < -0.3
    assert ratios.max() > 0.3
    assert ratios.abs().max() < 20


LOSS_TYPES = {
    "sigmoid": (methods.dpo, {}),
    "hinge": (methods.hinge, {}),
    "ipo": (methods.ipo, {}),
    "exo_pair": (methods.exo_pair, {"label_smoothing": 1e-3}),
    "exo_pair 0.2": (partial(methods.exo_pair, label_smoothing=0.2), {"label_smoothing": 0.2}),
    "nca_pair": (methods.nca_pair, {}),
    "robust": (partial(methods.robust, label_smoothing=0.1), {"label_smoothing": 0.1}),
    "bco_pair": (methods.bco_pair, {}),
    "sppo_hard": (methods.sppo_hard, {}),
    "aot": (methods.aot, {}),
    "aot 0.2": (partial(methods.aot, label_smoothing=0.2), {"label_smoothing": 0.2}),
    "aot_unpaired": (methods.aot_unpaired, {}),
    "aot_unpaired 0.2": (partial(methods.aot_unpaired, label_smoothing=0.2), {"label_smoothing": 0.2}),
    "apo_zero": (methods.apo_zero, {}),
    "apo_down": (methods.apo_down, {}),
    "discopop": (methods.discopop, {}),
    "sft": (methods.sft, {}),
    "sigmoid_norm": (methods.sigmoid_norm, {}),
}


def test_every_loss_type_of_trl_is_compared(dpo_trainer):
    with pytest.raises(ValueError, match="Should be one of") as caught:
        trl_loss(dpo_trainer, loss_types=["none"])
    known = str(caught.value).split("Should be one of")[1]
    ours = {name.split()[0] for name in LOSS_TYPES}
    assert known.count("'") == 2 * len(ours)
    assert all(f"'{name}'" in known for name in ours)


@pytest.mark.parametrize(
    ("name", "function", "settings"), [(k, *v) for k, v in LOSS_TYPES.items()], ids=LOSS_TYPES
)
def test_every_loss_type_of_the_dpo_trainer(name, function, settings, dpo_trainer):
    expected = trl_loss(dpo_trainer, loss_types=[name.split()[0]], beta=0.25, **settings)
    loss = our_loss(dpo_trainer, FusedPairLoss(function, beta=0.25))
    assert_same_training(loss, expected, dpo_trainer.model)


def test_the_dpo_of_the_other_class(dpo_trainer):
    batch, loss_fn = dpo_trainer.batch, FusedFocalPOLoss.dpo(beta=0.3)
    references = FusedPairLoss(methods.dpo).reference_logps
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    states = [
        hidden_states(model, batch["input_ids"], batch["attention_mask"])
        for model in (dpo_trainer.model, dpo_trainer.ref_model)
    ]
    refs = references(states[1], dpo_trainer.ref_model.lm_head.weight, labels, shift=True)
    out = loss_fn(states[0], dpo_trainer.model.lm_head.weight, labels, None, *refs, shift=True)
    assert_same_training(out.loss, trl_loss(dpo_trainer, beta=0.3), dpo_trainer.model)


@pytest.mark.parametrize(
    ("loss_type", "f_divergence", "alpha"),
    [
        ("sigmoid", "reverse_kl", 0.5),
        ("sigmoid", "forward_kl", 0.5),
        ("sigmoid", "js_divergence", 0.5),
        ("sigmoid", "alpha_divergence", 0.0),
        ("sigmoid", "alpha_divergence", 0.5),
        ("sigmoid", "alpha_divergence", 1.0),
        ("sigmoid", "alpha_divergence", 1.5),
        ("ipo", "js_divergence", 0.5),
        ("sigmoid_norm", "alpha_divergence", 0.5),
        ("hinge", "forward_kl", 0.5),
    ],
)
def test_every_f_divergence(loss_type, f_divergence, alpha, dpo_trainer):
    expected = trl_loss(
        dpo_trainer,
        loss_types=[loss_type],
        f_divergence_type=f_divergence,
        f_alpha_divergence_coef=alpha,
    )
    own_alpha = alpha if f_divergence == "alpha_divergence" else None
    function = methods.with_f_divergence(LOSS_TYPES[loss_type][0], f_divergence, own_alpha)
    # f′(t) = 1 − 1/t and powers of t: a log-ratio off by δ puts the score off by t·δ.
    assert_same_training(
        our_loss(dpo_trainer, FusedPairLoss(function)), expected, dpo_trainer.model, 2 * RTOL
    )


@pytest.mark.parametrize("ld_alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sft", "nca_pair"])
def test_ld_dpo(loss_type, ld_alpha, dpo_trainer):
    expected = trl_loss(dpo_trainer, loss_types=[loss_type], ld_alpha=ld_alpha)
    loss_fn = FusedPairLoss(LOSS_TYPES[loss_type][0], ld_alpha=ld_alpha)
    assert_same_training(our_loss(dpo_trainer, loss_fn), expected, dpo_trainer.model)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "bco_pair"])
def test_wpo(loss_type, dpo_trainer):
    expected = trl_loss(dpo_trainer, loss_types=[loss_type], use_weighting=True)
    function = methods.with_wpo_weights(LOSS_TYPES[loss_type][0])
    loss_fn = FusedPairLoss(function, outputs=("log_sum_sq_probs",))
    assert_same_training(our_loss(dpo_trainer, loss_fn), expected, dpo_trainer.model)


@pytest.mark.parametrize("use_weighting", [False, True], ids=["", "wpo"])
def test_a_mixture_of_losses(use_weighting, dpo_trainer):
    weights = {"sigmoid": 0.8, "bco_pair": 0.2, **({} if use_weighting else {"sft": 1.5})}
    expected = trl_loss(
        dpo_trainer,
        loss_types=list(weights),
        loss_weights=list(weights.values()),
        use_weighting=use_weighting,
    )
    function = methods.weighted_sum(*((LOSS_TYPES[name][0], weight) for name, weight in weights.items()))
    if use_weighting:
        function = methods.with_wpo_weights(function)
    loss_fn = FusedPairLoss(function, outputs=("log_sum_sq_probs",))
    assert_same_training(our_loss(dpo_trainer, loss_fn), expected, dpo_trainer.model)


# KTOTrainer


@pytest.fixture(scope="module", params=[(20, 30), (30, 20)], ids=["", "KL cut off at 0"])
def kto_trainer(request, tokenizer, tmp_path_factory):
    """The completions are random to both models: the sharper finds them less likely. Hence the KL's sign."""
    args = KTOConfig(**arguments(tmp_path_factory.mktemp("kto")))
    sharpness, ref_sharpness = request.param
    models = (llama(tokenizer, 0.3, sharpness), llama(tokenizer, 0.0, ref_sharpness))
    trainer = built(KTOTrainer, *models, args=args, tokenizer=tokenizer)
    trainer.batch = next(iter(trainer.get_train_dataloader()))
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
    assert_same_training(out.loss, expected, model)


# CPOTrainer, ORPOTrainer


@pytest.fixture(scope="module")
def cpo_trainer(tokenizer, tmp_path_factory):
    args = CPOConfig(**{**arguments(tmp_path_factory.mktemp("cpo")), "max_length": 60})
    return with_pair_batch(built(CPOTrainer, llama(tokenizer), args=args, tokenizer=tokenizer))


@pytest.fixture(scope="module")
def orpo_trainer(tokenizer, tmp_path_factory):
    args = ORPOConfig(**{**arguments(tmp_path_factory.mktemp("orpo")), "max_length": 60})
    return with_pair_batch(built(ORPOTrainer, llama(tokenizer), args=args, tokenizer=tokenizer))


def with_pair_batch(trainer):
    trainer.batch = next(iter(trainer.get_train_dataloader()))
    return trainer


def our_reference_free_loss(trainer, loss_fn) -> torch.Tensor:
    batch = trainer.concatenated_inputs(trainer.batch, padding_value=trainer.processing_class.pad_token_id)
    ids, attention, labels = (
        batch[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels")
    )
    hidden = hidden_states(trainer.model, ids, attention)
    return loss_fn(hidden, trainer.model.lm_head.weight, labels, shift=True).loss


def simpo(pairs: Pairs) -> torch.Tensor:
    margin = pairs.beta * (pairs.chosen_mean_logps - pairs.rejected_mean_logps) - 0.5
    return -torch.nn.functional.logsigmoid(margin) + 0.7 * methods.sft(pairs)


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


@pytest.mark.parametrize(("function", "settings"), CPO_CASES.values(), ids=CPO_CASES)
def test_cpo(function, settings, cpo_trainer):
    defaults = {"beta": 0.1, "label_smoothing": 0.0, "cpo_alpha": 1.0, "simpo_gamma": 0.5, "alpha": 0.0}
    for name, value in {**defaults, **settings}.items():
        setattr(cpo_trainer, name, value)
    expected, _ = cpo_trainer.get_batch_loss_metrics(cpo_trainer.model, cpo_trainer.batch)
    loss = our_reference_free_loss(cpo_trainer, FusedPairLoss(function, beta=cpo_trainer.beta))
    assert_same_training(loss, expected, cpo_trainer.model)


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
    assert_same_training(ours - nll + nll_with_prompt, expected, model)
