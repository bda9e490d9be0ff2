"""Attributes that DPOTrainer's loss reads at every step: set on both trainers, and then both compared."""

from __future__ import annotations

import warnings
from copy import deepcopy
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

from peft import LoraConfig, get_peft_model
from transformers import EarlyStoppingCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl_tiny import (
    RECORDS,
    TOKENIZER,
    assert_same_run,
    focal_trainer,
    llama,
    near,
    recorded,
    seeded,
    settings,
    trainer_of,
)

from focalkern import FusedFocalPOLoss
from focalkern.trl import FocalPOConfig, FocalPOTrainer, PackedPreferenceCollator

RTOL = 2e-5
SEEN = 20 * RTOL  # what a change must make of a loss
LOSSES = ["sigmoid", "ipo", "robust", "discopop", "sigmoid_norm"]
# Of Δ alone, so that all take an f-divergence.
START = {"loss_type": LOSSES, "label_smoothing": 0.1, "loss_weights": [1.0] * len(LOSSES)}
IDS = TOKENIZER([record["prompt"] + record["chosen"] for record in RECORDS])["input_ids"]
EXAMPLES = [
    {"prompt_ids": ids[:4], "chosen_ids": ids[4:], "rejected_ids": other[5:]}
    for ids, other in pairwise(IDS[:5])
]
# As of a tokenizer without BOS: nothing predicts the first token of a completion.
WITHOUT_PROMPT = [{**example, "prompt_ids": []} for example in EXAMPLES[:2]] + EXAMPLES[2:]


def both(folder, **options) -> tuple[DPOTrainer, FocalPOTrainer]:
    model = seeded(llama)
    models = (model, near(model, 0.02))
    pair = ((DPOTrainer, DPOConfig), (FocalPOTrainer, FocalPOConfig))
    return tuple(
        trainer_of(config(**settings(folder, **options)), *deepcopy(models), trainer_class=trainer)
        for trainer, config in pair
    )


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    theirs, ours = both(tmp_path_factory.mktemp("attributes"), **START)
    packed = focal_trainer(theirs.args.output_dir, ours.model, ours.ref_model, padding_free=True, **START)
    return theirs, ours, packed


def one(name: str) -> list[float]:
    return [float(x == name) for x in LOSSES]


def losses(trainers, values: dict, examples=EXAMPLES) -> list[torch.Tensor]:
    """Of TRL's trainer, and of ours on padded and on packed rows, with these attributes."""
    padded = DataCollatorForPreference(TOKENIZER.pad_token_id)(examples)
    batches = (padded, padded, PackedPreferenceCollator()(examples))
    found = []
    for trainer, batch in zip(trainers, batches, strict=True):
        before = {name: getattr(trainer, name) for name in values}
        try:
            for name, value in values.items():
                setattr(trainer, name, value)
            found.append(trainer.compute_loss(trainer.model, batch).detach())
        finally:
            for name, value in before.items():
                setattr(trainer, name, value)
    return found


SET = {
    "beta": {"beta": 0.7},
    "an integer": {"beta": 1},
    "no label smoothing": {"label_smoothing": 0.0, "loss_weights": one("robust")},
    "label smoothing": {"label_smoothing": 0.4},
    "ld_alpha": {"ld_alpha": 0.3},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence"},
    "beta and weights": {"beta": 0.02, "loss_weights": [0.5, 0.0, 2.0, 0.1, 1.0]},
    **{name: {"loss_weights": one(name), "beta": 0.3} for name in LOSSES},
}


@pytest.mark.parametrize("examples", [EXAMPLES, WITHOUT_PROMPT], ids=["", "without prompt"])
@pytest.mark.parametrize("values", SET.values(), ids=SET)
def test_an_attribute_that_is_set_does_what_it_does_in_trl(values, examples, trainers):
    theirs, ours, packed = losses(trainers, values, examples)
    torch.testing.assert_close(ours, theirs, rtol=RTOL, atol=0)
    torch.testing.assert_close(packed, theirs, rtol=RTOL, atol=0)
    weights = {"loss_weights": values.get("loss_weights", START["loss_weights"])}
    assert (losses(trainers, weights, examples)[0] / theirs - 1).abs() > SEEN


def test_the_exponent_of_an_alpha_divergence(trainers):
    values = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}
    before = losses(trainers, {"f_divergence_type": "alpha_divergence"})
    for trainer in trainers:
        for name, value in values.items():
            setattr(trainer, name, value)
    after = losses(trainers, {})
    for trainer in trainers:
        trainer.f_alpha_divergence_coef, trainer.f_divergence_type = 0.5, "reverse_kl"
    torch.testing.assert_close(after[1:], [after[0]] * 2, rtol=RTOL, atol=0)
    assert (after[0] / before[0] - 1).abs() > SEEN


def test_weights_that_are_changed_in_place_count(trainers):
    before = losses(trainers, {})
    for trainer in trainers:
        trainer.loss_weights[0] = 3.0
    after = losses(trainers, {})
    for trainer in trainers:
        trainer.loss_weights[0] = 1.0
    torch.testing.assert_close(after[1:], [after[0]] * 2, rtol=RTOL, atol=0)
    assert (after[0] / before[0] - 1).abs() > SEEN


def test_discopop_tau_is_read_from_the_arguments_as_in_trl(trainers):
    values = {"loss_weights": one("discopop")}
    before = losses(trainers, values)
    for trainer in trainers:
        trainer.args.discopop_tau = 0.9
    after = losses(trainers, values)
    for trainer in trainers:
        trainer.args.discopop_tau = 0.05
    torch.testing.assert_close(after[1:], [after[0]] * 2, rtol=RTOL, atol=0)
    assert (after[0] / before[0] - 1).abs() > SEEN


REFUSED = {
    "loss_types": (["sigmoid"], "loss_types cannot change once the trainer is made: .* set loss_weights"),
    "use_weighting": (True, "use_weighting cannot change once the trainer is made"),
    "beta": (-1.0, "beta must be finite and > 0"),
    "loss_weights": ([1.0], "loss_weights must be 5, one for each loss_type"),
    "label_smoothing": (0.6, "label_smoothing"),
    "ld_alpha": (1.5, "ld_alpha"),
    "f_divergence_type": ("kl", "f_divergence_type"),
    "f_alpha_divergence_coef": (0.3, "f_alpha_divergence_coef counts only with"),
}


@pytest.mark.parametrize(("name", "value", "message"), [(k, *v) for k, v in REFUSED.items()], ids=REFUSED)
def test_what_cannot_be_followed_refuses_to_be_set(name, value, message, trainers):
    for trainer in trainers[1:]:
        before = getattr(trainer, name)
        with pytest.raises(ValueError, match=message):
            setattr(trainer, name, value)
        assert getattr(trainer, name) == before


def test_a_tensor_for_a_number_is_refused(trainers):
    with pytest.raises(TypeError, match="beta must be a number"):
        trainers[1].beta = torch.tensor([0.1, 0.2])


def test_every_attribute_of_the_loss_is_kept_by_ours(trainers):
    """Those that DPOTrainer's constructor takes from its arguments, and its loss reads."""
    kept = {name for name, value in vars(FocalPOTrainer).items() if isinstance(value, property)}
    read = set(DPOTrainer._compute_loss.__code__.co_names)
    of_arguments = {"loss_types"} | {
        name for name in DPOConfig.__dataclass_fields__ if hasattr(trainers[0], name)
    }
    assert "beta" in read & of_arguments
    # What else it reads is read by our loss, too: `router_aux_loss_coef` of experts.
    assert read & of_arguments <= kept | set(FocalPOTrainer._compute_loss.__code__.co_names)


class Annealed(TrainerCallback):
    """β from step to step, as some schedules and adaptive methods set it."""

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.beta = (0.3, 0.02, 0.2)[state.global_step]


def test_beta_that_a_callback_sets_is_followed(tmp_path):
    runs = []
    for trainer in both(tmp_path, loss_type=["sigmoid"], learning_rate=1e-4):
        callback = Annealed()
        callback.trainer = trainer
        trainer.add_callback(callback)
        runs.append(recorded(trainer))
    assert_same_run(runs[1], runs[0], RTOL)
    assert runs[0].losses[0] != pytest.approx(runs[0].losses[2].item(), rel=0.1)


@pytest.mark.parametrize("options", [{"margin": 0.3}, {"gamma_beta_ratio": 0.3}], ids=str)
def test_the_focal_loss_follows_too(options, tmp_path):
    """The margin of `gamma_beta_ratio` stands inside β."""
    model = seeded(llama)
    options = {"gamma": 0.4, **options}
    trainer = focal_trainer(tmp_path, model, near(model), **options)
    trainer.beta, trainer.label_smoothing = 0.7, 0.2
    batch = DataCollatorForPreference(TOKENIZER.pad_token_id)(EXAMPLES)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    margin = options.get("margin") or 0.7 * 0.3
    loss_fn = FusedFocalPOLoss(0.7, gamma=0.4, margin=margin, label_smoothing=0.2)
    states = [
        m.model(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        for m in (trainer.ref_model, trainer.model)
    ]
    refs = loss_fn.reference_logps(states[0], trainer.ref_model.lm_head.weight, labels, shift=True)
    expected = loss_fn(states[1], trainer.model.lm_head.weight, labels, None, *refs, shift=True).loss
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected, rtol=RTOL, atol=0)
    assert trainer.args.beta == 0.1  # as in TRL


def test_without_a_reference_the_policy_is_none(tmp_path):
    model = seeded(llama)
    trainer = focal_trainer(tmp_path, model, near(model))
    trainer.ref_model = None
    with pytest.raises(ValueError, match="ref_model is None"):
        trainer.compute_loss(trainer.model, DataCollatorForPreference(0)(EXAMPLES))


# ------------------------------------------------------------------------------------------------- by the way


def test_the_configuration_shows_the_gamma_that_runs(tmp_path):
    assert FocalPOConfig(**settings(tmp_path)).gamma == 0.05
    assert FocalPOConfig(**settings(tmp_path, gamma_schedule="cosine")).gamma is None
    assert FocalPOConfig(**settings(tmp_path, loss_type=["sigmoid"])).gamma is None


def test_neftune_does_not_go_with_packed_rows(tmp_path):
    model = seeded(llama)
    with pytest.raises(ValueError, match="neftune_noise_alpha must not be given with padding_free=True"):
        focal_trainer(tmp_path, model, near(model), padding_free=True, neftune_noise_alpha=5.0)


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
BEST = {"load_best_model_at_end": True, **EVALUATED}
SCHEDULE = {"gamma_schedule": "cosine"}


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({**SCHEDULE, **BEST}, True),
        ({**SCHEDULE, **EVALUATED, "metric_for_best_model": "eval_loss"}, True),  # as early stopping asks for
        ({**SCHEDULE, **EVALUATED, "lr_scheduler_type": "reduce_lr_on_plateau"}, True),
        ({**SCHEDULE, **BEST, "metric_for_best_model": "eval_rewards/accuracies"}, False),
        (BEST, False),
        (SCHEDULE, False),
    ],
    ids=str,
)
def test_the_best_loss_of_a_schedule_is_warned_of(options, warned, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        args = FocalPOConfig(**settings(tmp_path, **options))
    found = [w for w in caught if "metric_for_best_model='eval_rewards/accuracies'" in str(w.message)]
    assert bool(found) is warned
    assert all(w.filename == __file__ for w in found)
    assert args.greater_is_better is (None if options is SCHEDULE else not (warned or options is BEST))


def test_the_metric_that_the_warning_names_is_there(tmp_path):
    from datasets import Dataset

    model = seeded(llama)
    best = {**SCHEDULE, **BEST, "metric_for_best_model": "eval_rewards/accuracies"}
    options = {"eval_dataset": Dataset.from_list(RECORDS), "callbacks": [EarlyStoppingCallback(1)]}
    trainer = focal_trainer(tmp_path, model, near(model), options=options, **best)
    trainer.train()
    accuracies = [x["eval_rewards/accuracies"] for x in trainer.state.log_history if "eval_loss" in x]
    assert trainer.state.best_metric == max(accuracies)


def in_bf16(way: str, folder) -> tuple[list, dict]:
    """Models in bf16, by the way they come, and options."""
    model = seeded(llama).to(torch.bfloat16)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    path = str(folder)
    if way == "adapter":
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]), autocast_adapter_dtype=False)
        return [adapted], {}
    return {
        "loaded": ([model, deepcopy(model)], {}),
        "path": ([path], {"model_init_kwargs": {"dtype": "bfloat16"}}),
        "path, auto": ([path], {"model_init_kwargs": {"dtype": "auto"}}),
    }[way]


@pytest.mark.parametrize("way", ["loaded", "path", "path, auto", "adapter"])
def test_lost_updates_are_warned_of_whichever_way_the_model_comes(way, tmp_path):
    given, options = in_bf16(way, tmp_path / "model")
    with pytest.warns(UserWarning, match="lose most updates of learning_rate=6e-07") as caught:
        focal_trainer(tmp_path, *given, learning_rate=6e-7, **options)
    (found,) = (w for w in caught if "lose most updates" in str(w.message))
    assert found.filename.endswith("trl_tiny.py")  # which makes the trainer


@pytest.mark.parametrize(
    ("engine", "precision", "lost"),
    [("fsdp", "no", True), ("fsdp", "bf16", False), ("deepspeed", "no", False), (None, "bf16", True)],
)
def test_an_engine_that_keeps_a_copy_in_float32_loses_none(engine, precision, lost):
    """FSDP makes one only where it mixes precisions."""
    trainer = SimpleNamespace(
        model=torch.nn.Linear(2, 2, dtype=torch.bfloat16),
        args=SimpleNamespace(learning_rate=1e-6),
        is_fsdp_enabled=engine == "fsdp",
        is_deepspeed_enabled=engine == "deepspeed",
        accelerator=SimpleNamespace(mixed_precision=precision),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FocalPOTrainer._warn_of_lost_updates(trainer)
    assert bool(caught) is lost
