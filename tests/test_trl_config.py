"""`FocalPOConfig` and the constructor of `FocalPOTrainer`: what they refuse, and by which name."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset, IterableDataset
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AfmoeConfig,
    AfmoeForCausalLM,
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama import modeling_llama
from trl import DPOConfig, TrlParser
from trl_tiny import (
    RECORDS,
    SIZES,
    TOKENIZER,
    VOCAB,
    WINDOW,
    focal_trainer,
    llama,
    mistral,
    mixtral,
    near,
    seeded,
    settings,
    trainer_of,
)

from focalkern import CosineGamma, ExponentialGamma, LinearGamma, shared_attention_mask
from focalkern.trl import FocalPOConfig, FocalPOTrainer, PackedPreferenceCollator, SharedPromptCollator
from focalkern.trl.packing import PACKABLE, prepare_model, sequences_are_apart

OWN_FIELDS = [f for f in dataclasses.fields(FocalPOConfig) if f.name not in DPOConfig.__dataclass_fields__]


def config(folder: Path, **changes) -> FocalPOConfig:
    return FocalPOConfig(**settings(folder, **changes))


# ---------------------------------------------------------------------------------------- what it stands for


def test_the_defaults_are_focalpo(tmp_path):
    loss_fn = config(tmp_path).focal_loss()
    assert (loss_fn.beta, loss_fn.gamma, loss_fn.modulation) == (0.1, 0.05, "focalpo")
    assert (loss_fn.margin, loss_fn.alpha, loss_fn.reference_free) == (0.0, 0.0, False)
    assert loss_fn.backward == "certified"


@pytest.mark.parametrize("value", ["false", 1, None])
def test_whether_prompts_are_shared_is_a_bool(value, tmp_path):
    with pytest.raises(TypeError, match="share_prompt must be True or False"):
        config(tmp_path, share_prompt=value)


def test_every_option_reaches_the_loss(tmp_path):
    options = {
        "beta": 0.7,
        "gamma": 0.2,
        "modulation": "inverse",
        "margin": 0.3,
        "alpha": 0.4,
        "reference_free": True,
        "length_normalize": True,
        "label_smoothing": 0.1,
        "ema_momentum": 0.5,
        "ema_bias_correction": False,
        "implicit_reference": "policy",
        "stop_gradient": False,
        "tau": 0.5,
        "backend": "torch",
    }
    alone = {"backward": "exact", "normalize_margin": False}
    loss_fn = config(tmp_path, **options).focal_loss()
    statistics = loss_fn.margin_statistics
    found = {"ema_momentum": statistics.momentum, "ema_bias_correction": statistics.bias_correction}
    assert {name: found.get(name, getattr(loss_fn, name, None)) for name in options} == options
    # None is left out: what the configuration adds to DPOConfig, but for the schedule.
    other = {
        "loss_type",
        "padding_free",
        "share_prompt",
        "max_tokens_per_batch",
        "gamma_beta_ratio",
        "gamma_schedule",
        "gamma_max",
        "gamma_min",
    }
    other |= {"gamma_rate", "gamma_schedule_steps"}
    assert {f.name for f in OWN_FIELDS} - other <= options.keys() | alone.keys()
    loss_fn = config(tmp_path, alpha=0.1, **alone).focal_loss()
    assert {name: getattr(loss_fn, name) for name in alone} == alone


def test_gamma_beta_ratio_is_the_margin_inside_beta(tmp_path):
    assert config(tmp_path, beta=2.5, gamma_beta_ratio=0.4).focal_loss().margin == pytest.approx(1.0)
    assert config(tmp_path, beta=2.5, gamma_beta_ratio=0.0).focal_loss().margin == 0.0


@pytest.mark.parametrize(
    ("options", "schedule"),
    [
        ({"gamma_schedule": "linear"}, LinearGamma(9, 0.1, 0.01)),
        ({"gamma_schedule": "cosine", "gamma_max": 0.5, "gamma_min": 0.0}, CosineGamma(9, 0.5, 0.0)),
        ({"gamma_schedule": "exponential", "gamma_rate": 5.0}, ExponentialGamma(9, 0.1, 0.01, 5.0)),
    ],
)
def test_schedules(options, schedule, tmp_path):
    assert config(tmp_path, gamma_schedule_steps=9, **options).focal_loss().gamma == schedule


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, True),
        ({"reference_free": True}, False),
        ({"reference_free": True, "alpha": 0.1}, True),
        ({"reference_free": True, "alpha": 0.1, "implicit_reference": "policy"}, False),
        ({"reference_free": True, "loss_type": ["focalpo", "sft"]}, False),
        ({"reference_free": True, "loss_type": ["focalpo", "ipo"]}, True),
        ({"loss_type": ["focalpo", "sft"]}, True),
        ({"loss_type": ["sft"]}, True),
    ],
)
def test_when_a_reference_is_needed(options, needed, tmp_path):
    assert config(tmp_path, **options).needs_reference is needed


# --------------------------------------------------------------------------------- the command line, and JSON


def test_every_own_field_has_a_help_text():
    assert len(OWN_FIELDS) >= 18
    for found in (
        *OWN_FIELDS,
        *(FocalPOConfig.__dataclass_fields__[n] for n in ("loss_type", "padding_free")),
    ):
        text = found.metadata.get("help", "")
        assert len(text) > 20, found.name
        assert "  " not in text, found.name


def parsed(*words: str) -> FocalPOConfig:
    arguments = ["--output_dir", "out", "--report_to", "none", "--use_cpu", "--bf16", "false", *words]
    (args,) = TrlParser((FocalPOConfig,)).parse_args_and_config(arguments)
    return args


def test_the_command_line():
    args = parsed(
        *("--gamma_schedule", "cosine", "--gamma_max", "0.2", "--modulation", "focal", "--tau", "0.001"),
        *("--no_ema_bias_correction", "--reference_free", "--alpha", "0.5", "--gamma_beta_ratio", "0.4"),
        *("--loss_type", "focalpo", "sft", "--loss_weights", "1.0", "0.1", "--padding_free"),
    )
    assert args.focal_loss().gamma == CosineGamma(1, 0.2)
    assert (args.tau, args.modulation, args.alpha) == (0.001, "focal", 0.5)
    assert not args.ema_bias_correction
    assert args.reference_free and args.padding_free
    assert args.loss_type == ["focalpo", "sft"]
    assert parsed("--tau", "auto", "--gamma", "0.3").focal_loss().gamma == 0.3


@pytest.mark.parametrize(
    "name", ["modulation", "gamma_schedule", "backward", "backend", "implicit_reference"]
)
def test_the_command_line_knows_the_choices(name, capsys):
    with pytest.raises(SystemExit):
        parsed(f"--{name}", "nonsense")
    assert "invalid choice" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": 0.3, "tau": 0.25},
        {"gamma_schedule": "exponential", "gamma_rate": 2.0, "gamma_schedule_steps": 7},
        {"loss_type": ["focalpo", "sigmoid"], "loss_weights": [0.5, 2.0], "padding_free": True},
    ],
)
def test_it_survives_json(options, tmp_path):
    args = config(tmp_path, **options)
    own = [f.name for f in OWN_FIELDS] + ["loss_type", "loss_weights", "padding_free"]
    for read in (json.loads(json.dumps(args.to_dict())), json.loads(args.to_json_string())):
        again = FocalPOConfig(**settings(tmp_path, **{name: read[name] for name in own}))
        assert {name: getattr(again, name) for name in own} == {name: getattr(args, name) for name in own}


@pytest.mark.parametrize("options", [{"gamma": 0.3, "tau": 0.25, "padding_free": True}, {}])
def test_it_is_saved_with_a_model(options, tmp_path):
    trainer = focal_trainer(tmp_path, *models(), **options)
    trainer.save_model(str(tmp_path / "saved"))
    args = torch.load(tmp_path / "saved" / "training_args.bin", weights_only=False)
    assert isinstance(args, FocalPOConfig)
    assert args.to_dict() == trainer.args.to_dict()
    assert args.padding_free is options.get("padding_free", False)


# ----------------------------------------------------------------------------------------- what it refuses


BY_TOKENS = {"padding_free": True, "max_tokens_per_batch": 4096, "per_device_train_batch_size": 8}
REFUSED = [
    ("beta", {"beta": 0.0}),
    ("gamma", {"gamma": -0.1}),
    ("gamma", {"gamma": float("nan")}),
    ("gamma", {"gamma": 0.1, "gamma_schedule": "cosine"}),
    ("gamma_schedule", {"gamma_schedule": "quadratic"}),
    ("gamma_max", {"gamma_max": 0.2}),
    ("gamma_max", {"gamma_schedule": "linear", "gamma_max": 0.001}),
    ("gamma_min", {"gamma_min": 0.2, "gamma": 0.1}),
    ("gamma_min", {"gamma_schedule": "linear", "gamma_min": -0.2}),
    ("gamma_rate", {"gamma_rate": 3.0}),
    ("gamma_rate", {"gamma_rate": 3.0, "gamma_schedule": "cosine"}),
    ("gamma_rate", {"gamma_rate": 0.0, "gamma_schedule": "exponential"}),
    ("gamma_schedule_steps", {"gamma_schedule_steps": 10}),
    ("gamma_schedule_steps", {"gamma_schedule_steps": 0, "gamma_schedule": "cosine"}),
    ("modulation", {"modulation": "FocalPO"}),
    ("margin", {"margin": 1.0, "gamma_beta_ratio": 0.5}),
    ("margin", {"margin": float("inf")}),
    ("gamma_beta_ratio", {"gamma_beta_ratio": float("nan")}),
    ("alpha", {"alpha": -1.0}),
    ("ema_momentum", {"ema_momentum": 1.0}),
    ("implicit_reference", {"implicit_reference": "kl"}),
    ("implicit_reference", {"implicit_reference": "sequence_kl", "alpha": 0.1}),
    ("label_smoothing", {"label_smoothing": 0.7}),
    ("label_smoothing", {"label_smoothing": 0.7, "loss_type": ["aot"]}),
    ("label_smoothing", {"label_smoothing": 0.5, "loss_type": ["robust"]}),
    ("label_smoothing", {"label_smoothing": 0.0, "loss_type": ["exo_pair"]}),
    ("label_smoothing", {"label_smoothing": 0.1, "loss_type": ["sigmoid", "ipo"]}),
    ("discopop_tau", {"discopop_tau": 0.0, "loss_type": ["discopop"]}),
    ("implicit_reference", {"implicit_reference": "policy"}),
    ("normalize_margin", {"normalize_margin": False}),
    ("stop_gradient", {"stop_gradient": False}),
    ("ema_momentum", {"ema_momentum": 0.5}),
    ("ema_momentum", {"ema_momentum": 0.5, "alpha": 0.1, "normalize_margin": False}),
    ("ema_bias_correction", {"ema_bias_correction": False}),
    ("tau", {"tau": 1e-3, "backward": "exact"}),
    ("discopop_tau", {"discopop_tau": 0.1}),
    ("f_alpha_divergence_coef", {"f_alpha_divergence_coef": 0.3}),
    ("backward", {"backward": "fast"}),
    ("backend", {"backend": "cuda"}),
    ("tau", {"tau": -1.0}),
    ("tau", {"tau": "-0.5"}),
    ("tau", {"tau": "small"}),
    ("tau", {"tau": "nan"}),
    ("loss_type", {"loss_type": ["dpo"]}),
    ("loss_type", {"loss_type": ["focalpo", "dpo"]}),
    ("loss_type", {"loss_type": []}),
    ("loss_type", {"loss_type": ["focalpo", "focalpo"]}),
    ("loss_weights", {"loss_type": ["focalpo", "sft"], "loss_weights": [1.0]}),
    ("loss_weights", {"loss_weights": [float("nan")]}),
    ("ld_alpha", {"ld_alpha": 0.5}),
    ("ld_alpha", {"ld_alpha": 1.5, "loss_type": ["sigmoid"]}),
    ("f_divergence_type", {"f_divergence_type": "forward_kl"}),
    ("f_divergence_type", {"f_divergence_type": "forward_kl", "loss_type": ["sft"]}),
    ("f_divergence_type", {"f_divergence_type": "forward_kl", "loss_type": ["bco_pair"]}),
    ("f_divergence_type", {"f_divergence_type": "kl", "loss_type": ["sigmoid"]}),
    ("max_tokens_per_batch", {**BY_TOKENS, "padding_free": False}),
    ("max_tokens_per_batch", {**BY_TOKENS, "max_tokens_per_batch": 0}),
    ("max_tokens_per_batch", {**BY_TOKENS, "max_tokens_per_batch": 4096.0}),
    ("max_tokens_per_batch", {**BY_TOKENS, "loss_type": ["focalpo", "aot"]}),
    ("max_tokens_per_batch", {**BY_TOKENS, "loss_type": ["aot_unpaired"]}),
    ("per_device_train_batch_size", {**BY_TOKENS, "per_device_train_batch_size": 2}),
    ("auto_find_batch_size", {**BY_TOKENS, "auto_find_batch_size": True}),
    ("train_sampling_strategy", {**BY_TOKENS, "train_sampling_strategy": "group_by_length"}),
    ("dataloader_drop_last", {**BY_TOKENS, "dataloader_drop_last": True}),
    ("split_batches", {**BY_TOKENS, "accelerator_config": {"split_batches": True}}),
    ("dispatch_batches", {**BY_TOKENS, "accelerator_config": {"dispatch_batches": True}}),
    ("use_weighting", {"use_weighting": True}),
    ("use_weighting", {"use_weighting": True, "loss_type": ["aot"]}),
    *(
        (name, {name: value, "loss_type": ["sigmoid"]})
        for name, value in {
            "gamma": 0.1,
            "gamma_schedule": "cosine",
            "gamma_max": 0.1,
            "gamma_schedule_steps": 5,
            "modulation": "focal",
            "margin": 0.0,
            "gamma_beta_ratio": 0.5,
            "alpha": 0.1,
            "reference_free": True,
            "length_normalize": True,
            "ema_momentum": 0.5,
            "ema_bias_correction": False,
            "implicit_reference": "policy",
            "normalize_margin": False,
            "stop_gradient": False,
        }.items()
    ),
]


@pytest.mark.parametrize(("name", "options"), REFUSED)
def test_a_bad_configuration_is_refused_by_name(name, options, tmp_path):
    with pytest.raises((ValueError, TypeError), match=rf"(^|`){name}\b"):
        config(tmp_path, **options)


# -------------------------------------------------------------------------- what the trainer refuses


def models() -> tuple:
    model = seeded(llama)
    return model, near(model)


CAUSAL = {"task_type": "CAUSAL_LM"}
DORA = LoraConfig(target_modules=["lm_head"], use_dora=True, **CAUSAL)
PROMPT = PromptTuningConfig(num_virtual_tokens=2, **CAUSAL)
IA3 = IA3Config(target_modules=["lm_head", "k_proj"], feedforward_modules=[], **CAUSAL)


def prompted():
    return get_peft_model(llama(), PROMPT)


def deep_head():
    model = llama()
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, VOCAB))
    return model


def streamed() -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(RECORDS))


def mamba():
    return MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4))


def afmoe():
    sizes = {"intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    sizes |= {"num_experts": 2, "num_experts_per_tok": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return AfmoeForCausalLM(AfmoeConfig(vocab_size=VOCAB, hidden_size=16, **sizes))


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, **sizes))


def with_images() -> Dataset:
    return Dataset.from_list([record | {"image": None} for record in RECORDS])


def flash():
    """As a model loaded with FlashAttention: it need not be installed to be refused."""
    model = llama()
    model.config._attn_implementation_internal = "flash_attention_2"
    return model


def flex():
    model = llama()
    model.set_attn_implementation("flex_attention")
    return model


def other_windows():
    """A configuration that names a window, which the layers do not have."""
    model = llama()
    model.config.sliding_window = WINDOW
    return model


def bloom():
    return BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2))


SIMPO = {"reference_free": True, "length_normalize": True, "gamma": 0.0}
PACKED = {"padding_free": True}
SHARED = {"share_prompt": True}
METRICS = {"compute_metrics": lambda: lambda _: {}}
LINEAR = {"gamma_schedule": "linear"}
PAIR = [llama, lambda: near(llama())]
REFUSED_BY_THE_TRAINER = {
    # name: (in the message, makers of the models, options of the configuration, of the trainer)
    "iterable without steps": ("max_steps", PAIR, LINEAR | {"max_steps": -1}, {"train_dataset": streamed}),
    "no reference": ("ref_model", [llama], {}, {}),
    "alpha without a reference": ("ref_model must be given.*alpha=0.5", [llama], {"alpha": 0.5, **SIMPO}, {}),
    "reference that is not used": ("ref_model", PAIR, SIMPO, {}),
    "reference that is not computed": (
        "precompute_ref_log_probs",
        [llama],
        {**SIMPO, "precompute_ref_log_probs": True},
        {},
    ),
    "reference that is not kept": ("sync_ref_model", [llama], {**SIMPO, "sync_ref_model": True}, {}),
    "deep head": ("lm_head", [deep_head, llama], {}, {}),
    "deep head of the reference": ("lm_head", [llama, deep_head], {}, {}),
    "DoRA": ("lm_head", [llama], {}, {"peft_config": lambda: DORA}),
    "IA3": ("lm_head", [llama], {}, {"peft_config": lambda: IA3}),
    "packed, collator": ("data_collator", PAIR, PACKED, {"data_collator": PackedPreferenceCollator}),
    "packed, metrics": ("compute_metrics", PAIR, PACKED, METRICS),
    "packed, multiple": ("pad_to_multiple_of", PAIR, {**PACKED, "pad_to_multiple_of": 8}, {}),
    "packed, prompt learning": ("prompt learning", [llama], PACKED, {"peft_config": lambda: PROMPT}),
    "packed, prompt learning of the user": ("prompt learning", [prompted], {**PACKED, **SIMPO}, {}),
    "packed, stateful": ("padding_free", [mamba, mamba], PACKED, {}),
    "packed, masks without positions": ("padding_free", [afmoe, afmoe], PACKED, {}),
    "packed, no masks": ("padding_free", [bloom, bloom], PACKED, {}),
    "shared, collator": ("data_collator", PAIR, SHARED, {"data_collator": SharedPromptCollator}),
    "shared, metrics": ("compute_metrics must not be .* share_prompt", PAIR, SHARED, METRICS),
    "shared, prompt learning": ("prompt learning", [llama], SHARED, {"peft_config": lambda: PROMPT}),
    "shared, stateful": ("share_prompt must be False with Mamba", [mamba, mamba], SHARED, {}),
    "shared, no masks": ("share_prompt", [bloom, bloom], SHARED, {}),
    "shared, loss of the router": ("router_aux_loss_coef", [mixtral, mixtral], SHARED, {}),
    "shared, flash": ("attn_implementation .* 'flash_attention_2'", [flash, llama], SHARED, {}),
    "shared, flash of the reference": ("attn_implementation", [llama, flash], SHARED, {}),
    "shared, flex on a CPU": ("attn_implementation must be 'sdpa'", [flex, llama], SHARED, {}),
    "shared, images": ("images must not be given", PAIR, SHARED, {"train_dataset": with_images}),
    "shared, encoder-decoder": ("share_prompt must be False with T5", [t5, t5], SHARED, {}),
    "shared, NEFTune": ("neftune_noise_alpha", PAIR, SHARED | {"neftune_noise_alpha": 5.0}, {}),
    "shared, window of unused layers": ("share_prompt", [other_windows, llama], SHARED, {}),
    "batches by tokens, streamed": ("max_tokens_per_batch", PAIR, BY_TOKENS, {"train_dataset": streamed}),
    "batches by tokens, long pair": (
        "max_tokens_per_batch must hold the longest pair, 66 tokens in row 4 of the train dataset.*got 65",
        PAIR,
        {**BY_TOKENS, "max_tokens_per_batch": 65},
        {},
    ),
    "no data": ("train_dataset", PAIR, LINEAR, {"train_dataset": lambda: None}),
    "packed, no data": ("train_dataset", PAIR, PACKED, {"train_dataset": lambda: None}),
}


@pytest.mark.parametrize("case", REFUSED_BY_THE_TRAINER.values(), ids=REFUSED_BY_THE_TRAINER)
def test_what_cannot_be_trained_is_refused_by_name(case, tmp_path):
    name, makers, changes, options = case
    args = config(tmp_path, **changes)
    options = {"train_dataset": Dataset.from_list(RECORDS)} | {key: make() for key, make in options.items()}
    with pytest.raises((ValueError, TypeError), match=name):
        trainer_of(args, *map(seeded, makers), **options)
    assert args.padding_free == changes.get("padding_free", False)


@pytest.mark.parametrize("layout", [PACKED, SHARED], ids=["packed", "shared"])
@pytest.mark.parametrize("make", [mamba, bloom])
def test_what_cannot_be_packed_is_refused_also_where_it_cannot_be_tried(make, layout, tmp_path, monkeypatch):
    monkeypatch.setattr("focalkern.trl.packing.is_whole", lambda model: False)
    with pytest.raises(ValueError, match=next(iter(layout))):
        focal_trainer(tmp_path, seeded(make), seeded(make), **layout)


@pytest.fixture(scope="module")
def packing_trainer(tmp_path_factory):
    """Of use until a configuration is made without a trainer: that resets what accelerate knows."""
    return focal_trainer(tmp_path_factory.mktemp("packing"), *models(), padding_free=True)


@pytest.mark.parametrize("name", sorted(PACKABLE))
def test_what_is_packed_untried_passes_where_it_can_be_tried(name, packing_trainer, monkeypatch):
    sizes = {**SIZES, "head_dim": 16, "vocab_size": VOCAB, "moe_intermediate_size": 16, "num_experts": 4}
    sizes["num_experts_per_tok"] = 2
    config = AutoConfig.for_model(name, **sizes, bos_token_id=0, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(config)
    logits_of = functools.partial(packing_trainer._logits, model)
    for collator in (PackedPreferenceCollator(), SharedPromptCollator(), SharedPromptCollator(one_row=False)):
        assert sequences_are_apart(model, collator, logits_of)
    monkeypatch.setattr("focalkern.trl.packing.is_whole", lambda model: False)
    assert sequences_are_apart(model, collator, logits_of)


def causal_mask(config, position_ids, seen_until):
    """Rejected sees chosen, and pairs see each other."""
    return shared_attention_mask(config, position_ids, torch.full_like(seen_until, seen_until.shape[1]))


def mask_by_place(config, position_ids, seen_until):
    """A window that counts the tokens of chosen between rejected and its prompt."""
    return shared_attention_mask(config, torch.arange(position_ids.shape[1])[None], seen_until)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make", "mask"), [(llama, causal_mask), (mistral, mask_by_place)])
def test_a_model_with_another_mask_is_refused(make, mask, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("focalkern.trl.trainer.shared_attention_mask", mask)
    with pytest.raises(ValueError, match="share_prompt must be False with"):
        focal_trainer(tmp_path, *(seeded(make).to(dtype) for _ in range(2)), share_prompt=True)


def test_a_gradient_from_another_sequence_is_seen_below_the_rounding(packing_trainer, monkeypatch):
    """Where the leak is too small for the logits to show it."""
    model = seeded(llama)
    collator, logits_of = SharedPromptCollator(), functools.partial(packing_trainer._logits, model)
    assert sequences_are_apart(model, collator, logits_of)
    attend = modeling_llama.eager_attention_forward

    def leak(module, query, key, value, attention_mask, **options):
        return attend(module, query, key, value, attention_mask.clamp(min=-20.0), **options)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", leak)
    assert not sequences_are_apart(model, collator, logits_of)


@torch._dynamo.config.patch(recompile_limit=8)
def test_flex_attention_has_one_row_and_what_it_cannot_do_is_refused_by_name(packing_trainer):
    model, gpu = seeded(flex), torch.device("cuda")
    collator, logits_of = SharedPromptCollator(), functools.partial(packing_trainer._logits, model)
    prepare_model(model, collator, gpu, False, logits_of)
    assert collator.one_row
    assert torch._dynamo.config.recompile_limit == 32
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(ValueError, match=r"attn_implementation must be .* a model on several devices"):
        prepare_model(model, collator, gpu, False, logits_of)
    del model.hf_device_map
    model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"attn_implementation must be .* attention_dropout=0.1"):
        prepare_model(model, collator, gpu, False, logits_of)


def test_a_model_on_another_device_than_the_batches_is_tried_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(FocalPOTrainer, "_prepare_inputs", lambda *_: pytest.fail("moved to the trainer's"))
    focal_trainer(tmp_path, *models(), share_prompt=True)


def test_weights_with_nan_are_not_taken_for_leaking_layers(tmp_path):
    model = seeded(llama)
    model.lm_head.weight.data[0, 0] = torch.nan
    focal_trainer(tmp_path, model, seeded(llama), share_prompt=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_counts_positions_by_itself_is_refused(dtype, tmp_path, monkeypatch):
    forward = LlamaModel.forward
    monkeypatch.setattr(LlamaModel, "forward", lambda *a, position_ids=None, **given: forward(*a, **given))
    with pytest.raises(ValueError, match="share_prompt must be False with Llama"):
        focal_trainer(tmp_path, *(model.to(dtype) for model in models()), share_prompt=True)


def test_the_reference_is_tried_too(tmp_path):
    with pytest.raises(ValueError, match="padding_free must be False with Mamba"):
        focal_trainer(tmp_path, seeded(llama), seeded(mamba), padding_free=True)


def test_a_refused_packing_leaves_no_log_probs_in_the_cache(tmp_path, monkeypatch):
    computed = []
    monkeypatch.setattr(FocalPOTrainer, "compute_ref_log_probs", lambda *given: computed.append(given))
    with pytest.raises(ValueError, match="padding_free"):
        focal_trainer(tmp_path, seeded(mamba), padding_free=True, precompute_ref_log_probs=True)
    assert not computed


@pytest.mark.parametrize("layout", [PACKED, SHARED], ids=["packed", "shared"])
def test_packing_is_tried_without_the_checkpoints_and_the_dropout_of_training(layout, tmp_path):
    model = seeded(llama).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert focal_trainer(tmp_path, model, seeded(llama), **layout).padding_free == (layout is PACKED)
    assert model.training


@pytest.mark.parametrize("layout", [PACKED, SHARED], ids=["packed", "shared"])
def test_the_logits_of_packed_rows_are_not_handed_out(layout, tmp_path):
    trainer = focal_trainer(tmp_path, *models(), **layout)
    with pytest.raises(ValueError, match=f"{next(iter(layout))} must be False for predict"):
        trainer.predict(trainer.train_dataset)


@pytest.mark.parametrize(("objective", "copied"), [(SIMPO, False), ({}, True)], ids=["SimPO", "FocalPO"])
def test_an_adapter_of_the_user_is_copied_for_a_reference_alone(objective, copied, tmp_path):
    model = get_peft_model(seeded(llama), LoraConfig(target_modules=["q_proj"]))
    trainer = focal_trainer(tmp_path, model, **objective)
    assert set(trainer.model.peft_config) == {"default", *(["ref"] if copied else [])}
    trainer.train()


@pytest.mark.parametrize("name", ["dpo", "simpo", "alpha_dpo", "dynamic", "focal"])
def test_a_loss_that_is_an_option_of_focalpo_is_pointed_to(name, tmp_path):
    with pytest.raises(ValueError, match=f"^loss_type '{name}' is 'focalpo' with "):
        config(tmp_path, loss_type=[name])


def test_a_backend_that_cannot_run_is_refused_at_construction(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there it can")
    with pytest.raises(ValueError, match="backend='triton' needs hidden on a CUDA device"):
        focal_trainer(tmp_path, *models(), backend="triton")


@pytest.mark.parametrize(
    ("dtype", "rate", "lost"),
    [(torch.bfloat16, 6e-7, True), (torch.bfloat16, 1e-3, False), (torch.float32, 6e-7, False)],
)
def test_updates_that_16_bit_weights_would_lose_are_warned_of(dtype, rate, lost, tmp_path):
    pair = [model.to(dtype) for model in models()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        focal_trainer(tmp_path, *pair, learning_rate=rate)
    assert any("lose most updates of learning_rate" in str(w.message) for w in caught) is lost


@pytest.mark.parametrize(("steps", "jumps"), [(4, False), (6, True)])
def test_a_schedule_that_is_resumed_over_other_steps_is_warned_of(steps, jumps, tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2, "gamma_schedule": "cosine"}
    focal_trainer(tmp_path, *models(), max_steps=4, **saved).train()
    trainer = focal_trainer(tmp_path, *models(), max_steps=steps, **saved)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert any("gamma_schedule_steps=4 continues it" in str(w.message) for w in caught) is jumps


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_statistics_that_were_not_saved_are_missed(alpha, tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True, "alpha": alpha}
    focal_trainer(tmp_path, *models(), **saved).train()
    trainer = focal_trainer(tmp_path, *models(), **saved)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    missed = ["running statistics of alpha-DPO start anew" in str(warning.message) for warning in caught]
    assert any(missed) is (alpha > 0)


def test_packing_is_not_said_to_be_unavailable(tmp_path, caplog):
    focal_trainer(tmp_path, *models(), padding_free=True)
    assert "padding_free" not in caplog.text


def test_a_configuration_of_trl_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"^args must be a FocalPOConfig; got DPOConfig"):
        trainer_of(DPOConfig(**settings(tmp_path)), *models())


def test_the_model_is_named_where_there_is_no_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seeded(llama).save_pretrained("some-llama")
    TOKENIZER.save_pretrained("some-llama")
    # TRL's default is bf16, which transformers refuses where there is no GPU.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    trainer = trainer_of(None, "some-llama")
    assert trainer.args.output_dir == "some-llama-FocalPO"
    assert isinstance(trainer.args, FocalPOConfig)


def test_trl_is_left_as_it_was(tmp_path):
    from trl.trainer import dpo_trainer

    names = ("add_fused_lm_head", "create_model_from_path", "BaseTunerLayer")
    before = [getattr(dpo_trainer, name) for name in names]
    focal_trainer(tmp_path, *models())
    with pytest.raises(TypeError):
        focal_trainer(tmp_path, seeded(deep_head), seeded(llama))
    assert [getattr(dpo_trainer, name) for name in names] == before
    assert re.match("trl", before[0].__module__)
