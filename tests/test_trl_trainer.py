"""`FocalPOTrainer` against a plain loop on full logits, and against TRL's own DPOTrainer, step for step."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset, IterableDataset, load_from_disk
from largest import Largest
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl_tiny import (
    CONVERSATIONS,
    MODELS,
    RECORDS,
    SIZES,
    TOKENIZER,
    VOCAB,
    WINDOW,
    KillAt,
    Killed,
    Recording,
    assert_same_history,
    assert_same_run,
    focal_trainer,
    history,
    llama,
    mistral,
    mixtral,
    near,
    random_model,
    recorded,
    seeded,
    settings,
    sharpened,
    trainer_of,
)

from focalkern import FusedFocalPOLoss, reference
from focalkern.trl import FocalPOConfig, FocalPOTrainer

# In fp32 the worst of all runs here is off by 1.5e-5: log-probs of up to 400 nats, times beta.
RTOL = 5e-5

# ----------------------------------------------------------------------------------- against a plain loop


class Moments:
    """α-DPO's μ and σ as its paper has them: exponential averages of the moments of batches."""

    def __init__(self, momentum: float, bias_correction: bool) -> None:
        self.momentum, self.bias_correction = momentum, bias_correction
        self.mean = self.std = self.weight = self.std_weight = 0.0

    def normalized(self, values: torch.Tensor) -> torch.Tensor:
        """After the batch has been taken in. One pair alone counts with its distance from the mean so far."""
        mean = values.mean().item()
        std = values.std().item() if len(values) > 1 else abs(mean - self.mean / (self.weight or 1.0))
        self.mean = self.momentum * self.mean + (1 - self.momentum) * mean
        self.std = self.momentum * self.std + (1 - self.momentum) * std
        self.weight = self.momentum * self.weight + 1 - self.momentum
        scale = self.weight if self.bias_correction else 1.0
        self.moments = (self.mean / scale, self.std / scale)
        return (values - self.moments[0]) / self.moments[1]


def sums_of_logps(model, batch: dict) -> torch.Tensor:  # [2B]
    """From full logits."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    logps = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return (logps * batch["completion_mask"][:, 1:]).sum(-1)


def plain_loss(model, ref, batch: dict, args, gamma: float, moments: Moments) -> torch.Tensor:
    logps = sums_of_logps(model, batch)
    with torch.no_grad(), model.disable_adapter() if ref is None else contextlib.nullcontext():
        ref_logps = sums_of_logps(model if ref is None else ref, batch)
    lengths = batch["completion_mask"][:, 1:].sum(-1) if args.length_normalize else torch.ones(len(logps))
    margin = args.beta * args.gamma_beta_ratio if args.gamma_beta_ratio else args.margin or 0.0
    if args.alpha:
        chosen, rejected = ((logps - ref_logps) / lengths).detach().chunk(2)
        margin = margin + args.alpha * moments.normalized(args.beta * (chosen - rejected))
    refs = torch.zeros_like(ref_logps) if args.reference_free else ref_logps
    return reference.pair_losses(
        *logps.chunk(2),
        *refs.chunk(2),
        *lengths.chunk(2),
        beta=args.beta,
        gamma=gamma,
        modulation=args.modulation,
        margin=margin,
        label_smoothing=args.label_smoothing,
    ).mean()


def plain_gamma(args, step: int) -> float:
    if args.gamma_schedule is None:
        return 0.05 if args.gamma is None else args.gamma
    assert args.gamma_schedule == "cosine"
    fall = (1 + math.cos(math.pi * step / args.max_steps)) / 2
    return args.gamma_min + (args.gamma_max - args.gamma_min) * fall


def plain_run(model, ref, examples: list[list[dict]], args) -> Recording:
    recording = Recording()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=args.learning_rate)
    moments = Moments(args.ema_momentum, args.ema_bias_correction)
    collate = DataCollatorForPreference(TOKENIZER.pad_token_id, args.max_length, args.truncation_mode)
    accumulated = args.gradient_accumulation_steps
    model.train()
    for micro_step, batch in enumerate(examples[: accumulated * args.max_steps]):
        gamma = plain_gamma(args, micro_step // accumulated)
        loss = plain_loss(model, ref, collate(batch), args, gamma, moments) / accumulated
        loss.backward()
        recording.logged.append({"focal/gamma": gamma})
        if args.alpha:
            recording.logged[-1] |= dict(zip(("alpha/mean", "alpha/std"), moments.moments, strict=True))
        recording.add(loss, model)
        if micro_step % accumulated == accumulated - 1:
            torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    return recording


ADAPTERS = {
    "full": None,
    "body": ["q_proj", "v_proj", "up_proj", "down_proj"],
    "head": ["lm_head"],
    "head and body": ["lm_head", "q_proj", "down_proj"],
}


def lora(targets: list[str], **options) -> LoraConfig:
    """Of some size from the start: policy and reference differ in the first step."""
    options = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.1, "init_lora_weights": False, **options}
    return LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **options)


OBJECTIVES = {
    "FocalPO": {"gamma": 0.05},
    "FocalPO of large gamma": {"gamma": 1.0, "beta": 0.05},
    "inverse": {"gamma": 0.3, "modulation": "inverse"},
    "focal": {"gamma": 2.0, "modulation": "focal"},
    "smoothed": {"gamma": 0.5, "label_smoothing": 0.2},
    "SimPO": {"gamma": 0.0, "beta": 2.0, "reference_free": True, "length_normalize": True}
    | {"gamma_beta_ratio": 0.5},
    "alpha-DPO": {"gamma": 0.0, "beta": 10.0, "reference_free": True, "length_normalize": True}
    | {"margin": 4.0, "alpha": 0.5},
    "focal alpha-DPO of its authors' statistics": {"gamma": 0.2, "alpha": 0.1, "ema_bias_correction": False}
    | {"ema_momentum": 0.5},
    "cosine": {"gamma_schedule": "cosine", "gamma_max": 1.0, "gamma_min": 0.1},
}


def both_runs(folder, model_name: str, targets: list[str] | None, objective: dict, **changes):
    """Ours and the plain one, and whether what ours logs is what the plain one knows."""
    model = seeded(MODELS[model_name])
    options = {} if targets is None else {"peft_config": lora(targets)}
    without_reference = targets or (objective.get("reference_free") and not objective.get("alpha"))
    refs = [] if without_reference else [near(model)]
    twin = deepcopy(model)
    trainer = focal_trainer(folder, model, *deepcopy(refs), options=options, **objective, **changes)
    if targets:
        twin = get_peft_model(twin, lora(targets, lora_dropout=0.0))
        twin.load_state_dict(trainer.model.state_dict())
    ours = recorded(trainer)
    ref = None if targets else refs[0] if refs else twin
    plain = plain_run(twin, ref, ours.examples, trainer.args)
    for step, entry in enumerate(history(trainer)[:-1]):
        micro_steps = plain.logged[2 * step : 2 * step + 2]
        for name in micro_steps[0]:
            assert entry[name] == pytest.approx(sum(x[name] for x in micro_steps) / 2, rel=RTOL)
    return ours, plain


LAYOUTS = {"padded": {}, "packed": {"padding_free": True}, "shared": {"share_prompt": True}}
CASES = [
    # model, layout, adapter, precompute_ref_log_probs, objective
    ("llama", "padded", "full", False, "FocalPO"),
    ("llama", "packed", "body", True, "cosine"),
    ("llama", "shared", "full", False, "alpha-DPO"),
    ("llama", "padded", "head", True, "smoothed"),
    ("gemma2", "packed", "full", True, "FocalPO of large gamma"),
    ("gemma2", "padded", "body", False, "alpha-DPO"),
    ("gemma2", "shared", "head", False, "FocalPO"),
    ("gemma2", "shared", "head and body", True, "inverse"),
    ("mistral", "packed", "full", False, "focal alpha-DPO of its authors' statistics"),
    ("mistral", "shared", "body", True, "focal"),
    ("mistral", "packed", "full", False, "SimPO"),
    ("mistral", "padded", "head", False, "cosine"),
    ("mistral", "packed", "head and body", True, "FocalPO"),
]


@pytest.mark.parametrize(("model", "layout", "adapter", "precompute", "objective"), CASES)
def test_a_run_is_that_of_a_plain_loop(model, layout, adapter, precompute, objective, tmp_path):
    ours, plain = both_runs(
        tmp_path,
        model,
        ADAPTERS[adapter],
        OBJECTIVES[objective],
        precompute_ref_log_probs=precompute,
        **LAYOUTS[layout],
    )
    assert_same_run(ours, plain, RTOL)


# ---------------------------------------------------------------------------------- against TRL's DPOTrainer

# Logits and entropy are means of values of both signs.
METRIC_ATOL = 1e-5


def trl_and_ours(folder: Path, *models, options: dict | None = None, focal: dict | None = None, **changes):
    """Both trainers trained from the same weights: (TRL's, its recording), (ours, its recording)."""
    runs = []
    for trainer_class, config_class, own in (
        (DPOTrainer, DPOConfig, {}),
        (FocalPOTrainer, FocalPOConfig, focal or {"loss_type": changes.get("loss_type", ["sigmoid"])}),
    ):
        args = config_class(**{**settings(folder), **changes, **own})
        given = {key: x() if callable(x) else deepcopy(x) for key, x in (options or {}).items()}
        trainer = trainer_of(args, *deepcopy(models), trainer_class=trainer_class, **given)
        runs.append((trainer, recorded(trainer)))
    return runs


def assert_as_trl(folder: Path, *models, **given):
    (theirs, their_run), (ours, our_run) = trl_and_ours(folder, *models, **given)
    assert_same_run(our_run, their_run, RTOL)
    assert_same_history(history(ours), history(theirs), RTOL, METRIC_ATOL)
    return theirs


def model_and_reference(make=llama):
    model = seeded(make)
    return model, near(model)


EVALUATED = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 4}


def evaluation_on(dataset=None) -> dict:
    return {"options": {"eval_dataset": dataset or Dataset.from_list(RECORDS[::-1])}, **EVALUATED}


def size_of_logits(prediction) -> dict[str, float]:
    return {"logits": float(abs(prediction.predictions).mean()), "ids": float(prediction.label_ids.sum())}


def streamed() -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(RECORDS))


# Every loss type is compared on one batch, in test_trl_parity.
LOSSES = {
    "one name": {"loss_type": "hinge"},
    "MPO": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.5]},
    "weighted MPO": {"loss_type": ["sigmoid", "ipo"], "loss_weights": [0.5, 2.0], "use_weighting": True},
    # Scores are powers of the density ratio here, and so are their errors: policies that stay near.
    "forward_kl": {"loss_type": ["sigmoid", "ipo"], "f_divergence_type": "forward_kl", "learning_rate": 2e-4},
    "ld_alpha": {"loss_type": ["sigmoid", "ipo"], "ld_alpha": 0.3},
}


@pytest.mark.parametrize("changes", LOSSES.values(), ids=LOSSES)
def test_a_run_with_losses_of_trl_is_trl_s(changes, tmp_path):
    model = seeded(llama)
    ref = near(model, 0.02 if "f_divergence_type" in changes else 0.3)
    assert_as_trl(tmp_path, model, ref, **evaluation_on(), **changes)


VARIATIONS = {
    **{model: evaluation_on() for model in MODELS},
    "conversations, AdamW": {"options": {"train_dataset": Dataset.from_list(CONVERSATIONS)}}
    | {"optim": "adamw_torch", "learning_rate": 1e-3},
    "precomputed": {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3},
    "precomputed with ld_alpha": {"precompute_ref_log_probs": True, "ld_alpha": 0.5},
    "no checkpointing, padded to a multiple": {"gradient_checkpointing": False, "pad_to_multiple_of": 16},
    "reentrant checkpointing, cut at the end": {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    | {"max_length": 14},
    "synchronised reference, cut at the start": {"sync_ref_model": True, "ref_model_sync_steps": 1}
    | {"ref_model_mixup_alpha": 0.5, "max_length": 7, "truncation_mode": "keep_end"},
    "streamed, seldom logged": {"options": {"train_dataset": streamed}, "logging_steps": 2, "max_steps": 4},
    "several evaluations": evaluation_on(
        {"a": Dataset.from_list(RECORDS[:3]), "b": Dataset.from_list(RECORDS[3:])}
    ),
    "logits for the user": {
        **EVALUATED,
        "options": {"eval_dataset": Dataset.from_list(RECORDS), "compute_metrics": lambda: size_of_logits},
    },
}


@pytest.mark.parametrize("variation", VARIATIONS)
def test_without_gamma_it_is_trl_s_dpo(variation, tmp_path):
    options = VARIATIONS[variation]
    focal = {"loss_type": ["sigmoid"]} if "ld_alpha" in options else {"gamma": 0.0}
    assert_as_trl(tmp_path, *model_and_reference(MODELS.get(variation, llama)), focal=focal, **options)


@pytest.mark.parametrize("loaded", [False, True], ids=["new adapter", "adapter of the user"])
def test_adapters_have_the_reference_that_they_have_in_trl(loaded, tmp_path):
    """The base model; of an adapter that was there before, a copy as it was."""
    model, config = seeded(llama), lora(ADAPTERS["body"])
    if loaded:
        assert_as_trl(tmp_path, seeded(lambda: get_peft_model(model, config)), focal={"gamma": 0.0})
    else:
        assert_as_trl(tmp_path, model, focal={"gamma": 0.0}, options={"peft_config": config})


def test_prompt_tuning_is_trl_s(tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert_as_trl(
        tmp_path,
        seeded(llama),
        focal={"gamma": 0.0},
        options={"peft_config": config},
        gradient_checkpointing=False,
    )


def test_the_auxiliary_loss_of_experts_is_trl_s(tmp_path):
    models = model_and_reference(mixtral)
    theirs = assert_as_trl(tmp_path, *models, focal={"gamma": 0.0}, **evaluation_on())
    assert history(theirs)[0]["aux_loss"] > 1
    assert history(theirs)[-2]["eval_aux_loss"] > 1


def test_autocast_costs_no_more_than_in_trl(tmp_path):
    given = {"focal": {"gamma": 0.0}, "max_steps": 1}
    models = model_and_reference()
    exact = trl_and_ours(tmp_path, *models, **given)[0][1]
    (_, theirs), (_, ours) = trl_and_ours(tmp_path, *models, **given, bf16=True)

    def error(run: Recording) -> tuple[float, float]:
        """RMS over the micro-steps of the first optimizer step, relative."""
        losses = [(a / b - 1).square() for a, b in zip(run.losses[:2], exact.losses[:2], strict=True)]
        got, right = (torch.cat([g.flatten() for g in r.gradients[1].values()]) for r in (run, exact))
        return (sum(losses) / 2).sqrt().item(), ((got - right).norm() / right.norm()).item()

    for our_error, their_error in zip(error(ours), error(theirs), strict=True):
        assert 0 < our_error <= 2 * their_error


def test_the_reference_of_an_adapter_is_computed_in_advance_as_it_is_in_training(tmp_path):
    """Under autocast too, which nothing but the trainer puts around a model before training.

    All batches are of one shape: on some CPUs (AMD EPYC, torch 2.13), a bf16 product of other rows rounds
    otherwise.
    """
    losses = []
    for precompute in (False, True):
        trainer = focal_trainer(
            tmp_path,
            seeded(llama),
            options={"peft_config": lora(ADAPTERS["body"]), "records": RECORDS[:2]},
            bf16=True,
            precompute_ref_log_probs=precompute,
        )
        losses.append(torch.stack(recorded(trainer).losses))
    torch.testing.assert_close(*losses, rtol=RTOL, atol=0)


# --------------------------------------------------------------------------------- packed, shared and padded


def in_all_layouts(folder: Path, make=llama, records=RECORDS, layouts=tuple(LAYOUTS), **changes) -> list:
    model, ref = model_and_reference(make)
    runs = []
    for layout in layouts:
        dataset = records() if callable(records) else Dataset.from_list(records)
        options = {"train_dataset": dataset, "eval_dataset": dataset}
        args = FocalPOConfig(**settings(folder, **{**EVALUATED, **changes, **LAYOUTS[layout]}))
        trainer = trainer_of(args, deepcopy(model), deepcopy(ref), **options)
        runs.append((trainer, recorded(trainer)))
    return runs


UNEQUAL = [
    {"prompt": "The sky is", "chosen": " blue." * 28, "rejected": " green."},
    {"prompt": "Yes." * 20, "chosen": " no.", "rejected": " not so."},
    {"prompt": "", "chosen": " blue", "rejected": " the sky is not blue, no." * 4},
    {"prompt": "a", "chosen": " b", "rejected": " c"},
    {"prompt": "The hat is", "chosen": " red.", "rejected": " not red, no." * 8},
]


def logging_mixtral():
    """Whose configuration asks for the logits of the router."""
    model = mixtral()
    model.config.output_router_logits = True
    return model


OTHER_MODELS = {
    "Qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "Qwen3": {"head_dim": 16},
    "Phi3": {"sliding_window": WINDOW},
}
LAYOUT_CASES = {
    "one pair a batch": {"per_device_train_batch_size": 1, "alpha": 0.2},
    "gemma2": {"make": MODELS["gemma2"]},
    **{
        kind: {"make": partial(random_model, kind, vocab_size=VOCAB, **options)}
        for kind, options in OTHER_MODELS.items()
    },
    "experts": {"make": mixtral, "layouts": ("padded", "packed")},
    "experts without their loss": {"make": logging_mixtral, "router_aux_loss_coef": 0.0},
    "very unequal lengths": {"make": mistral, "records": UNEQUAL},
    "cut at the end": {"max_length": 9, "records": UNEQUAL},
    "cut at the start": {"max_length": 9, "records": UNEQUAL, "truncation_mode": "keep_end"},
    "SimPO": {"records": UNEQUAL, **OBJECTIVES["SimPO"]},
    "alpha-DPO without checkpointing": {"make": mistral, "gradient_checkpointing": False}
    | OBJECTIVES["alpha-DPO"],
    "mixed, streamed": {"loss_type": ["focalpo", "ipo", "sft"], "loss_weights": [1.0, 0.1, 2.0], "gamma": 0.4}
    | {"records": streamed},
    "ld_alpha, use_weighting": {"loss_type": ["sigmoid", "sigmoid_norm"], "ld_alpha": 0.2}
    | {"use_weighting": True, "records": UNEQUAL},
    "precomputed, conversations": {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3}
    | {"records": CONVERSATIONS},
}


@pytest.mark.parametrize("case", LAYOUT_CASES.values(), ids=LAYOUT_CASES)
def test_packed_and_shared_are_padded(case, tmp_path):
    if case.get("reference_free") and not case.get("alpha"):
        case = {**case, "alpha": 1e-9}  # so that the reference that all cases have is taken
    (padded, padded_run), *others = in_all_layouts(tmp_path, **case)
    for other, run in others:
        assert_same_run(run, padded_run, 1e-5)
        # Floating-point operations are counted with the padding.
        assert_same_history(history(other), history(padded), RTOL, METRIC_ATOL, without=("total_flos",))
        assert other.state.total_flos < padded.state.total_flos


def test_fifty_steps_with_shared_prompts_give_the_curve_of_padded_ones(tmp_path):
    """By AdamW, which magnifies what rounds otherwise."""
    changes = {"max_steps": 50, "gradient_accumulation_steps": 1, "optim": "adamw_torch", "gamma": 0.3}
    layouts = ("padded", "shared")
    (padded, run), (shared, _) = in_all_layouts(tmp_path, layouts=layouts, **changes, learning_rate=1e-3)
    assert run.losses[-1] < 0.5 * run.losses[0]
    for name in ("loss", "rewards/margins", "grad_norm"):
        curves = [[x[name] for x in history(trainer) if name in x] for trainer in (padded, shared)]
        assert len(curves[0]) == 50
        assert curves[1] == pytest.approx(curves[0], rel=1e-3), name


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_eval_loss_is_the_mean_over_all_pairs(layout, tmp_path):
    """Of 7 pairs in batches of 4 and 3."""
    model, ref = model_and_reference()
    options = {"eval_dataset": Dataset.from_list(RECORDS)}
    args = {**EVALUATED, "gamma": 0.3, **layout}
    trainer = focal_trainer(tmp_path, deepcopy(model), deepcopy(ref), options=options, **args)
    examples = [trainer.eval_dataset[i] for i in range(len(RECORDS))]
    collate = DataCollatorForPreference(TOKENIZER.pad_token_id)
    with torch.no_grad():
        alone = torch.stack([plain_loss(model, ref, collate([x]), trainer.args, 0.3, None) for x in examples])
    expected, of_batches = alone.mean(), (alone[:4].mean() + alone[4:].mean()) / 2
    assert abs(of_batches / expected - 1) > 100 * RTOL
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=RTOL)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_pairs_weigh_the_same_whatever_their_length(layout, tmp_path):
    """A step over 1 × 4 pairs and over 4 × 1, and the mean of the gradients of each pair alone."""
    model, ref = model_and_reference()
    totals = []
    for batch_size in (4, 1):
        changes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 4 // batch_size}
        args = FocalPOConfig(**settings(tmp_path, max_steps=1, gamma=0.3, **layout, **changes))
        records = [*UNEQUAL[:2], *UNEQUAL[3:]]
        run = recorded(trainer_of(args, deepcopy(model), deepcopy(ref), records=records))
        assert len(run.losses) == 4 // batch_size
        totals.append(Recording(losses=[sum(run.losses)], gradients=[run.gradients[-1]]))
    assert_same_run(totals[1], totals[0], RTOL)


# ------------------------------------------------------------------------------------------------ checkpoints


SCHEDULED_ALPHA = {**OBJECTIVES["alpha-DPO"], **OBJECTIVES["cosine"], "gamma": None}


@pytest.mark.parametrize(
    ("objective", "layout"),
    [(OBJECTIVES["cosine"], "shared"), (SCHEDULED_ALPHA, "packed")],
    ids=["cosine, shared", "alpha-DPO, packed"],
)
def test_a_run_that_was_killed_goes_on_as_if_it_had_not(objective, layout, tmp_path):
    model, ref = model_and_reference()
    common = {**objective, **LAYOUTS[layout], "max_steps": 6, "lr_scheduler_type": "linear"}
    common |= EVALUATED | {"eval_steps": 1, "save_strategy": "steps", "save_steps": 2}
    common |= {"optim": "adamw_torch", "learning_rate": 1e-3}

    def trainer(folder, *callbacks):
        options = {"eval_dataset": Dataset.from_list(RECORDS), "callbacks": list(callbacks)}
        return focal_trainer(folder, deepcopy(model), deepcopy(ref), options=options, **common)

    whole = trainer(tmp_path / "whole")
    whole.train()
    with pytest.raises(Killed):
        trainer(tmp_path / "killed", KillAt(5)).train()
    resumed = trainer(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)

    # The last entry is a summary, with the mean loss of the steps since the start of the process.
    assert history(resumed)[:-1] == history(whole)[:-1]
    logged = history(whole)[8]
    assert logged["step"] == 5
    assert {"loss", "num_tokens", "focal/gamma"} <= logged.keys()
    assert ("alpha/mean" in logged) == ("alpha/std" in logged) == ("alpha" in objective)


class KillProcess(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process with threads cannot be forked")
def test_a_process_that_was_killed_goes_on_in_another(tmp_path):
    options = {**SCHEDULED_ALPHA, "max_steps": 4, "padding_free": True}
    options |= {"save_strategy": "steps", "save_steps": 2}
    if (child := os.fork()) == 0:
        try:
            torch.set_num_threads(1)  # a fork has none but its own
            signal.alarm(300)  # else this test would wait for ever
            model = seeded(llama)
            callbacks = {"callbacks": [KillProcess()]}
            focal_trainer(tmp_path / "killed", model, near(model), options=callbacks, **options).train()
        finally:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    runs = []
    for folder, resume in (("whole", None), ("killed", True)):
        model = seeded(llama)
        runs.append(focal_trainer(tmp_path / folder, model, near(model), **options))
        runs[-1].train(resume_from_checkpoint=resume)
    expected, resumed = (history(run)[2:-1] for run in runs)
    assert [entry["step"] for entry in resumed] == [3, 4]
    assert_same_history(resumed, expected, rtol=1e-5, atol=1e-6)


def test_statistics_and_schedule_stay_as_they_are_in_evaluation(tmp_path):
    options = {"eval_dataset": Dataset.from_list(RECORDS)}
    trainer = focal_trainer(tmp_path, *model_and_reference(), options=options, **SCHEDULED_ALPHA)
    trainer.train()
    before = {key: value.clone() for key, value in trainer.loss_fn.state_dict().items()}
    first, second = trainer.evaluate(), trainer.evaluate()
    after = trainer.loss_fn.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert trainer.loss_fn.focal.margin_statistics.std > 0
    statistics = trainer.loss_fn.focal.margin_statistics.moments()
    assert (first["eval_alpha/mean"], first["eval_alpha/std"]) == tuple(x.float().item() for x in statistics)
    assert first["eval_loss"] == second["eval_loss"]


def test_the_model_card_names_the_paper(tmp_path):
    trainer = focal_trainer(tmp_path, *model_and_reference())
    trainer.create_model_card("a-model")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "trained with FocalPO" in text
    assert "Focusing on Correct Preference Rankings" in text
    assert "Secretly a Reward Model" not in text


def test_a_margin_that_is_not_normalised_has_no_statistics_to_log(tmp_path):
    trainer = focal_trainer(tmp_path, *model_and_reference(), alpha=0.1, normalize_margin=False)
    trainer.train()
    assert "focal/gamma" in history(trainer)[0]
    assert not {"alpha/mean", "alpha/std"} & history(trainer)[0].keys()


# ------------------------------------------------------------------------------------- references, and memory


def test_reference_log_probs_of_other_settings_are_not_taken_from_the_cache(tmp_path, monkeypatch):
    """They would be in TRL: its cache knows the dataset and the model alone."""
    Dataset.from_list(RECORDS).save_to_disk(tmp_path / "data")
    model, ref = model_and_reference()
    own, batches = FocalPOTrainer.compute_ref_log_probs, []
    counting = lambda *given: batches.append(True) or own(*given)  # noqa: E731
    monkeypatch.setattr(FocalPOTrainer, "compute_ref_log_probs", counting)

    def ref_logps(**changes) -> tuple[list[float], bool]:
        batches.clear()
        options = {"train_dataset": load_from_disk(tmp_path / "data")}
        changes["precompute_ref_log_probs"] = True
        trainer = focal_trainer(tmp_path, deepcopy(model), deepcopy(ref), options=options, **changes)
        return trainer.train_dataset["ref_chosen_logps"][:], bool(batches)

    ref_logps()  # the tokenizer hashes otherwise before its first use
    first, again = ref_logps(), ref_logps()
    assert again == (first[0], False)
    for changes in (
        {"max_length": 7, "truncation_mode": "keep_end"},
        {"loss_type": ["sigmoid"], "ld_alpha": 0.0},
        {"bf16": True},
    ):
        other, is_computed = ref_logps(**changes)
        assert is_computed
        assert other != first[0]


@pytest.fixture
def saved_model(tmp_path) -> str:
    path = tmp_path / "model"
    seeded(llama).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    ("objective", "loads", "by_path"),
    [("SimPO", 1, True), ("SimPO", 1, False), ("FocalPO", 2, False), ("alpha-DPO", 2, True)],
)
def test_no_more_models_are_loaded_and_run_than_needed(objective, loads, by_path, saved_model, monkeypatch):
    loaded, runs = [], []
    load = LlamaForCausalLM.from_pretrained

    def counted_load(*args, **kwargs):
        loaded.append(load(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", counted_load)
    model = saved_model if by_path else load(saved_model)
    trainer = focal_trainer(saved_model + "-out", model, **OBJECTIVES[objective])
    assert len(loaded) == loads - (not by_path)
    assert (trainer.ref_model is None) == (loads == 1)
    for found in (trainer.model, trainer.ref_model):
        if found is not None:
            found.model.register_forward_hook(lambda module, *_: runs.append(module))
    trainer.train()
    assert trainer.state.global_step == 3
    assert len(runs) == 6 * loads


@pytest.mark.parametrize(("layout", "precompute"), [("padded", False), ("packed", True), ("shared", False)])
def test_no_tensor_is_as_large_as_the_logits(layout, precompute, tmp_path):
    vocab = 65536
    sizes = {**SIZES, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = seeded(lambda: LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **sizes)))
    text = " ".join(record["chosen"] for record in RECORDS)
    records = [{"prompt": "a", "chosen": text, "rejected": text[::-1]}] * 4
    changes = {**LAYOUTS[layout], "precompute_ref_log_probs": precompute, "max_steps": 1, "alpha": 0.1}
    options = {"eval_dataset": Dataset.from_list(records), "train_dataset": Dataset.from_list(records)}
    with Largest() as largest:
        trainer = focal_trainer(tmp_path, model, near(model), options=options, **changes)
        trainer.train()
        trainer.evaluate()
    tokens = trainer.state.log_history[0]["num_tokens"] / 2  # of a micro-batch
    assert vocab * sizes["hidden_size"] <= largest.elements <= tokens * vocab / 4


# ------------------------------------------------------------------------------------ the certified backward


@pytest.mark.parametrize(
    ("backward", "layout"), [*(("certified", layout) for layout in LAYOUTS), ("exact", "padded")]
)
def test_what_the_backward_left_out_is_logged(backward, layout, tmp_path):
    vocab, sizes = 8192, {**SIZES, "num_hidden_layers": 1}
    model = seeded(lambda: LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **sizes)))
    model = sharpened(model, 100.0).to(torch.bfloat16)
    ref = near(model)
    changes = {"max_steps": 1, "gradient_accumulation_steps": 1, "gamma": 0.3, **LAYOUTS[layout]}
    twin = deepcopy(model)
    trainer = focal_trainer(tmp_path, model, deepcopy(ref), backward=backward, **changes)
    examples = recorded(trainer).examples[0]
    logged = history(trainer)[0]
    if backward == "exact":
        assert not {"focal/dropped_mass", "focal/kept_share"} & logged.keys()
        return

    batch = DataCollatorForPreference(TOKENIZER.pad_token_id)(examples)
    inputs = (batch["input_ids"], batch["attention_mask"])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    loss_fn = FusedFocalPOLoss(gamma=0.3)
    with torch.no_grad():
        ref_logps = loss_fn.reference_logps(ref.model(*inputs)[0], ref.lm_head.weight, labels, shift=True)
    out = loss_fn(twin.model(*inputs)[0], twin.lm_head.weight, labels, None, *ref_logps, shift=True)
    out.loss.backward()
    assert 0 < out.kept_share < 1
    assert out.dropped_mass.any()
    assert (out.weight < 0).any()
    rel = 1e-3
    assert logged["focal/weight"] == pytest.approx(out.weight.mean().item(), rel=rel)
    assert logged["focal/flipped"] == (out.weight < 0).float().mean()
    mean_dropped = out.dropped_mass.sum() / out.lengths.sum()
    assert logged["focal/dropped_mass"] == pytest.approx(mean_dropped.item(), rel=rel)
    assert logged["focal/kept_share"] == pytest.approx(out.kept_share.item(), rel=rel)
