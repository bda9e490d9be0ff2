"""`focalkern.trl.patch()`: TRL's own trainers with it and without, step by step, and what it must not touch.

The trainers are real; the models are of random weights, in fp32 on the CPU.
"""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

import peft
import transformers
import trl
from datasets import Dataset
from tolerance import relative_error
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer import grpo_trainer
from trl_tiny import RECORDS, TOKENIZER, VOCAB, random_model, settings, trainer_of

import focalkern.trl
from focalkern.trl import head as head_module
from focalkern.trl import patching

COMPLETED = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in RECORDS]
PROMPTS = [{"prompt": r["prompt"]} for r in RECORDS]
TRAINER_MODULES = [
    importlib.import_module(f"trl.trainer.{name}_trainer") for name in ("sft", "dpo", "kto", "grpo", "rloo")
]
# Fp32 sums in another order: no metric was off by more than 1e-6 of its size, or 1e-6 where that is below 1
# (some are differences of log-probs of order 10). Adam divides each gradient by its size, small ones too: the
# weights were off by 1.6e-5 of the way that they go in three steps.
METRIC, NEAR_ZERO, UPDATE = 1e-5, 2e-6, 1e-4
NOT_COMPARED = ("runtime", "per_second", "step_time", "total_flos")


@pytest.fixture(autouse=True)
def unpatched():
    yield
    focalkern.trl.unpatch()


def built(**options):
    return random_model(vocab_size=VOCAB, sharpness=10.0, **options)


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory) -> str:
    """For GRPO and RLOO, which load the reference from where the policy came."""
    folder = str(tmp_path_factory.mktemp("model"))
    built().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def reward(completions, **_) -> list[float]:
    return [float(len(text) % 7) for text in completions]


GENERATION = {
    "max_completion_length": 6,
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "temperature": 0.8,
    "model_init_kwargs": {"dtype": "float32"},
}
MOE = {"kind": "Mixtral", "num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}
CAPPED = {"kind": "Gemma2", "final_logit_softcapping": 1.0, "head_dim": 16}
# trainer, options of its configuration, of the model
CASES = {
    "DPO": ("DPO", {"use_weighting": True}, {}),
    "DPO, softcap": ("DPO", {}, CAPPED),
    "KTO": ("KTO", {}, {}),
    "SFT": ("SFT", {"loss_type": "nll"}, {}),
    "SFT, MoE": ("SFT", {"loss_type": "nll"}, MOE),
    "SFT, DFT": ("SFT", {"loss_type": "dft"}, {}),
    "GRPO": ("GRPO", {**GENERATION, "beta": 0.04, "entropy_coef": 0.5}, {}),
    "RLOO": ("RLOO", {**GENERATION, "beta": 0.05}, {}),
    "CPO": ("CPO", {"loss_type": "sigmoid", "label_smoothing": 0.2, "cpo_alpha": 0.5}, {}),
    "AlphaPO": ("CPO", {"loss_type": "simpo", "cpo_alpha": 0.0, "alpha": 0.1}, {}),
    "CPO, IPO": ("CPO", {"loss_type": "ipo"}, {}),
    "CPO, softcap": ("CPO", {"loss_type": "hinge"}, CAPPED),
    "CPO, MoE": ("CPO", {"loss_type": "simpo"}, MOE),
    "ORPO": ("ORPO", {}, {}),
    "ORPO, softcap": ("ORPO", {}, CAPPED),
    "ORPO, MoE": ("ORPO", {}, MOE),
}
EXPERIMENTAL = {"CPO": (CPOConfig, CPOTrainer), "ORPO": (ORPOConfig, ORPOTrainer)}
PLAIN_ADAM = {"gradient_accumulation_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-3}


def made(name: str, folder, model, ref_model=None, **options):
    """A trainer of three steps that logs each, and evaluates after the last."""
    generates = name in ("GRPO", "RLOO")
    evaluated = {"eval_strategy": "steps", "eval_steps": 3, "max_length": 60}
    args = settings(folder, per_device_train_batch_size=3, remove_unused_columns=False, **PLAIN_ADAM)
    if generates:
        del args["max_length"]
    args |= ({} if generates else evaluated) | options
    records = PROMPTS if generates else COMPLETED if name == "SFT" else RECORDS
    given = {"reward_funcs": reward} if generates else {"eval_dataset": Dataset.from_list(records[:3])}
    if ref_model is not None:
        given["ref_model"] = ref_model
    config_class, trainer_class = EXPERIMENTAL.get(name) or (
        getattr(trl, f"{name}{kind}") for kind in ("Config", "Trainer")
    )
    return trainer_of(config_class(**args), model, trainer_class=trainer_class, records=records, **given)


def metrics_of(trainer) -> list[dict]:
    return [
        {k: v for k, v in entry.items() if not any(word in k for word in NOT_COMPARED)}
        for entry in trainer.state.log_history
    ]


def weights_of(model) -> torch.Tensor:
    return torch.cat([x.detach().flatten() for x in model.parameters()])


@pytest.mark.parametrize("case", CASES)
def test_training_is_what_it_was(case, saved_model, tmp_path, monkeypatch):
    name, options, model_options = CASES[case]

    def train(folder):
        model = saved_model if name in ("GRPO", "RLOO") else built(**model_options)
        ref = built(seed=1, **model_options) if name in ("DPO", "KTO") else None
        trainer = made(name, folder, model, ref, **options)
        start = weights_of(trainer.model)
        trainer.train()
        return trainer, weights_of(trainer.model) - start

    own, own_update = train(tmp_path / "own")
    calls = []
    own_logps = head_module.module_logps
    monkeypatch.setattr(head_module, "module_logps", lambda *args: calls.append(1) or own_logps(*args))
    with focalkern.trl.patch():
        ours, update = train(tmp_path / "ours")

    assert len(calls) >= 3
    assert len(ours.state.log_history) >= 4
    for expected, actual in zip(metrics_of(own), metrics_of(ours), strict=True):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert actual[key] == pytest.approx(expected[key], rel=METRIC, abs=NEAR_ZERO), key
    assert own_update.abs().max() > 1e-4
    assert relative_error(update, own_update) < UPDATE


@pytest.mark.parametrize("case", ["CPO", "AlphaPO", "ORPO"])
def test_the_metrics_of_the_logits_are_of_some_size(case, tmp_path):
    """Means over all positions: were they over the completions, the test above would see it."""
    name, options, _ = CASES[case]
    trainer = made(name, tmp_path, built(), **options)
    batch = next(iter(trainer.get_train_dataloader()))
    _, _, chosen, rejected, _ = trainer.concatenated_forward(trainer.model, batch)
    for side, logits in (("chosen", chosen), ("rejected", rejected)):
        completion = (batch[f"{side}_labels"] != -100)[:, 1:].float()
        shown = logits[:, : completion.shape[1]].mean(-1) * completion
        assert abs(shown.sum() / completion.sum() - logits.mean()) > 10 * METRIC


@pytest.mark.parametrize("name", ["CPO", "ORPO"])
@pytest.mark.parametrize("capped", [False, True], ids=["", "softcap"])
def test_no_logits_are_held(name, capped, tmp_path):
    model = built(**(CAPPED if capped else {}))
    outputs = []

    def look(module, args, output):
        outputs.append(type(output))

    look.__module__ = "deepspeed.runtime"  # foreign hooks are left out
    with focalkern.trl.patch():
        trainer = made(name, tmp_path, model)
        model.get_output_embeddings().register_forward_hook(look)
        trainer.train()
    assert set(outputs) == {tuple}  # of log-probs; logits come as a tensor


@pytest.mark.parametrize("name", ["DPO", "KTO", "SFT", "GRPO", "RLOO", "CPO", "ORPO"])
def test_a_lora_of_the_head_is_trained(name, saved_model, tmp_path):
    lora = peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    options = GENERATION if name in ("GRPO", "RLOO") else {}

    def trained():
        model = transformers.AutoModelForCausalLM.from_pretrained(saved_model)
        torch.manual_seed(3)
        model = peft.get_peft_model(model, lora)
        head = model.get_output_embeddings()
        start = [head.lora_A["default"].weight.clone(), head.lora_B["default"].weight.clone()]
        options_without_dict = {k: v for k, v in options.items() if k != "model_init_kwargs"}
        trainer = made(name, tmp_path, model, **options_without_dict)
        trainer.train()
        return [head.lora_A["default"].weight - start[0], head.lora_B["default"].weight - start[1]]

    with focalkern.trl.patch():
        ours = trained()
    assert all(x.abs().max() > 1e-4 for x in ours)
    if name in ("CPO", "ORPO"):  # these train it without us too
        for actual, expected in zip(ours, trained(), strict=True):
            assert relative_error(actual, expected) < UPDATE
    else:
        with pytest.raises(ValueError, match="lm_head"):
            trained()


def test_grpos_fp32_cast_is_still_refused_with_an_adapter_on_the_head(saved_model, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(saved_model)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))
    options = {k: v for k, v in GENERATION.items() if k != "model_init_kwargs"}
    with focalkern.trl.patch():
        with pytest.raises(ValueError, match="lm_head"):
            made("GRPO", tmp_path, model, cast_lm_head_to_fp32=True, **options)
        assert grpo_trainer.BaseTunerLayer is head_module.NoAdapter
        made("GRPO", tmp_path, model, **options)


def test_grpos_fp32_cast_works(saved_model, tmp_path):
    with focalkern.trl.patch():
        trainer = made("GRPO", tmp_path, saved_model, cast_lm_head_to_fp32=True, **GENERATION)
        trainer.train()
    assert len(trainer.state.log_history) == 4


def test_what_the_head_cannot_run_is_refused_by_name(tmp_path):
    for name in ("DPO", "CPO"):
        dora = peft.LoraConfig(target_modules=["lm_head"], use_dora=True)
        model = peft.get_peft_model(built(), dora)
        with focalkern.trl.patch(), pytest.raises(TypeError, match="DoraLinearVariant"):
            made(name, tmp_path, model)


def test_a_focalpo_trainer_is_made_under_the_patch(tmp_path):
    models = [built(), built(seed=1)]
    config = focalkern.trl.FocalPOConfig(
        str(tmp_path), report_to="none", use_cpu=True, bf16=False, backward="exact", max_steps=1
    )
    with focalkern.trl.patch():
        patched = vars(trl.trainer.dpo_trainer)["add_fused_lm_head"]
        trainer = focalkern.trl.FocalPOTrainer(
            *models, args=config, train_dataset=Dataset.from_list(RECORDS), processing_class=TOKENIZER
        )
        assert trl.trainer.dpo_trainer.add_fused_lm_head is patched
        batch = next(iter(trainer.get_train_dataloader()))
        out = trainer.model(batch["input_ids"], labels=batch["input_ids"], fused_lm_head=True)
        assert out.dropped_mass is None  # its own options, not the patch's
        trainer.train()


# What is replaced, and given back


def snapshot() -> dict:
    """What TRL's modules and the classes of their trainers hold, by identity."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "trl":
            continue
        for attribute, value in list(vars(module).items()):
            found[name, attribute] = value
            if isinstance(value, type) and value.__module__.startswith("trl"):
                found |= {(name, attribute, key): x for key, x in vars(value).items()}
    return found


def test_unpatch_gives_back_everything(tmp_path):
    own = snapshot()
    focalkern.trl.patch()
    changed = {key for key, value in snapshot().items() if own.get(key) is not value}
    assert ("trl.trainer.utils", "add_fused_lm_head") in changed
    assert ("trl.experimental.cpo", "CPOTrainer", "__init__") in changed
    for module in TRAINER_MODULES:
        assert (module.__name__, "add_fused_lm_head") in changed
        assert (module.__name__, "BaseTunerLayer") in changed
    assert trl.trainer.add_fused_lm_head is trl.trainer.utils.add_fused_lm_head
    made("CPO", tmp_path, built())
    focalkern.trl.unpatch()
    now = snapshot()
    assert {key for key, value in own.items() if now.get(key) is not value} == set()
    assert trl.trainer.add_fused_lm_head is trl.trainer.utils.add_fused_lm_head


def test_modules_that_are_loaded_under_the_patch_get_it_back_too():
    name = "trl.experimental.async_grpo.async_grpo_trainer"
    own = trl.trainer.utils.add_fused_lm_head
    loaded = {key: sys.modules.pop(key) for key in list(sys.modules) if key.startswith(name)}
    try:
        with focalkern.trl.patch():
            module = importlib.import_module(name)
            assert module.add_fused_lm_head is trl.trainer.utils.add_fused_lm_head is not own
        assert module.add_fused_lm_head is own
    finally:
        sys.modules.update(loaded)


def test_as_a_context_manager():
    own = trl.trainer.utils.add_fused_lm_head
    with focalkern.trl.patch():
        assert trl.trainer.utils.add_fused_lm_head is not own
        with focalkern.trl.patch():  # changes nothing, and takes nothing back
            pass
        assert trl.trainer.utils.add_fused_lm_head is not own
    assert trl.trainer.utils.add_fused_lm_head is own
    with contextlib.suppress(KeyError), focalkern.trl.patch():
        raise KeyError
    assert trl.trainer.utils.add_fused_lm_head is own


def test_twice_and_not_at_all():
    focalkern.trl.unpatch()
    focalkern.trl.patch(tau=0.001)
    patched = trl.trainer.utils.add_fused_lm_head
    focalkern.trl.patch(tau=0.001)
    assert trl.trainer.utils.add_fused_lm_head is patched
    with pytest.raises(ValueError, match=r"patched with .*0\.001.* got .*auto.*unpatch"):
        focalkern.trl.patch()
    assert trl.trainer.utils.add_fused_lm_head is patched
    focalkern.trl.unpatch()
    focalkern.trl.unpatch()
    with focalkern.trl.patch():
        pass


@pytest.mark.parametrize("name", ["DPO", "CPO"])
def test_options_reach_the_head(name, tmp_path):
    with focalkern.trl.patch(backward="exact"):
        trainer = made(name, tmp_path, built(), built() if name == "DPO" else None)
    ids = torch.arange(2, 8)[None]
    assert trainer.model(ids, labels=ids, fused_lm_head=True).dropped_mass is None


@pytest.mark.parametrize("options", [{"backward": "fast"}, {"tau": -1.0}, {"backend": "jax"}])
def test_options_are_checked_at_once(options):
    own = trl.trainer.utils.add_fused_lm_head
    with pytest.raises(ValueError, match=next(iter(options))):
        focalkern.trl.patch(**options)
    assert trl.trainer.utils.add_fused_lm_head is own


def test_a_trainer_keeps_the_head_that_it_was_made_with(tmp_path):
    with focalkern.trl.patch():
        ours = made("ORPO", tmp_path, built())
    batch = next(iter(ours.get_train_dataloader()))
    assert ours.concatenated_forward(ours.model, batch)[2].dim() == 2
    own = made("ORPO", tmp_path, built())
    with focalkern.trl.patch():
        assert own.concatenated_forward(own.model, batch)[2].dim() == 3


@pytest.mark.parametrize("method", ["concatenated_forward", "get_batch_logps", "get_batch_loss_metrics"])
def test_a_subclass_with_a_forward_of_its_own_keeps_it(method, tmp_path, monkeypatch):
    base = CPOTrainer

    class Own(base):
        pass

    if method == "get_batch_logps":
        Own.get_batch_logps = staticmethod(lambda *args, **kwargs: base.get_batch_logps(*args, **kwargs))
    else:
        setattr(Own, method, lambda self, *args: getattr(base, method)(self, *args))
    monkeypatch.setitem(EXPERIMENTAL, "CPO", (CPOConfig, Own))
    with focalkern.trl.patch():
        trainer = made("CPO", tmp_path, built())
        batch = next(iter(trainer.get_train_dataloader()))
        assert trainer.concatenated_forward(trainer.model, batch)[2].dim() == 3


@pytest.mark.parametrize("name", ["CPO", "ORPO"])
def test_encoder_decoder_models_keep_the_forward_of_trl(name, tmp_path):
    options = {"vocab_size": VOCAB, "d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 1}
    config = transformers.T5Config(**options, num_heads=2, decoder_start_token_id=1, pad_token_id=1)
    with focalkern.trl.patch():
        torch.manual_seed(0)
        model = transformers.T5ForConditionalGeneration(config)
        trainer = made(name, tmp_path, model, is_encoder_decoder=True, max_completion_length=16)
        trainer.train()
    assert "concatenated_forward" not in vars(trainer)
    assert "forward" not in vars(model)


def test_orpo_refuses_labels_that_are_not_the_input(tmp_path):
    with focalkern.trl.patch():
        trainer = made("ORPO", tmp_path, built())
    batch = next(iter(trainer.get_train_dataloader()))
    batch["chosen_labels"] = torch.where(batch["chosen_labels"] == -100, -100, 3)
    with pytest.raises(ValueError, match="chosen_labels must be the input ids"):
        trainer.concatenated_forward(trainer.model, batch)


# A TRL that is another


@pytest.mark.parametrize("version", ["1.15.9", "2.0.0", "0.9"])
def test_other_versions_are_refused(version, monkeypatch):
    monkeypatch.setattr(trl, "__version__", version)
    own = snapshot()
    with pytest.raises(ImportError, match=rf">= 1\.16, < 2; got trl {version}"):
        focalkern.trl.patch()
    assert all(own[key] is value for key, value in snapshot().items())


@pytest.mark.parametrize("version", ["1.16.0.dev0", "1.17.1"])
def test_versions_that_are_taken(version, monkeypatch):
    monkeypatch.setattr(trl, "__version__", version)
    with focalkern.trl.patch():
        pass


def changed_head(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=("log_probs",), chunk_size=1):
    raise AssertionError


def changed_method(self, model, batch, packed=False):
    raise AssertionError


@pytest.mark.parametrize(
    ("path", "name", "value", "match"),
    [
        ("trl.trainer.utils", "add_fused_lm_head", changed_head, "utils.add_fused_lm_head.*chunk_size"),
        ("trl.trainer.kto_trainer", "add_fused_lm_head", changed_head, "kto_trainer.add_fused_lm_head"),
        ("cpo", "concatenated_forward", changed_method, "CPOTrainer.concatenated_forward.*packed=False"),
        ("orpo", "concatenated_forward", changed_method, "ORPOTrainer.concatenated_forward.*packed=False"),
        ("cpo", "get_batch_logps", changed_method, "CPOTrainer.get_batch_logps"),
        ("orpo", "get_batch_logps", changed_method, "ORPOTrainer.get_batch_logps"),
        ("orpo", "get_batch_logps", None, "ORPOTrainer.get_batch_logps.*nothing of that name"),
        ("cpo", "concatenated_inputs", changed_method, "CPOTrainer.concatenated_inputs"),
        ("cpo", "__init__", changed_method, "CPOTrainer.__init__ must be its own, with an argument args"),
        ("grpo", "__init__", changed_method, "GRPOTrainer.__init__ must be its own"),
        ("orpo", "get_batch_loss_metrics", changed_method, "ORPOTrainer.get_batch_loss_metrics"),
    ],
)
def test_signatures_that_have_changed_are_refused(path, name, value, match, monkeypatch):
    classes = {"cpo": CPOTrainer, "orpo": ORPOTrainer, "grpo": grpo_trainer.GRPOTrainer}
    holder = classes.get(path) or sys.modules[path]
    monkeypatch.setattr(holder, name, value)
    own = snapshot()
    with pytest.raises(RuntimeError, match=match):
        focalkern.trl.patch()
    assert all(own[key] is x for key, x in snapshot().items())
    focalkern.trl.unpatch()


def test_a_field_more_of_the_output_is_refused(monkeypatch):
    monkeypatch.setattr(patching, "_OUTPUT_FIELDS", patching._OUTPUT_FIELDS[:-1])
    with pytest.raises(RuntimeError, match=r"fields of FusedCausalLMOutput must be .*aux_loss"):
        focalkern.trl.patch()


WITHOUT_PEFT = """
import importlib.util, sys, torch

find_spec = importlib.util.find_spec
is_peft = lambda name: name.partition(".")[0] == "peft"
importlib.util.find_spec = lambda name, *args: None if is_peft(name) else find_spec(name, *args)

class Hidden:
    def find_spec(self, name, *args):
        if is_peft(name):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
import focalkern.trl, transformers
from trl.trainer import dpo_trainer

with focalkern.trl.patch():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.LlamaConfig(vocab_size=64, **sizes)
    model = transformers.LlamaForCausalLM(config)
    dpo_trainer.add_fused_lm_head(model)
    ids = torch.arange(6)[None]
    model(ids, labels=ids, fused_lm_head=True).loss.backward()
assert model.lm_head.weight.grad.any()
assert not hasattr(dpo_trainer, "BaseTunerLayer")
"""


def test_where_peft_is_not_installed():
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", WITHOUT_PEFT], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
