"""The fused head inside transformers models, against the logits of the very models, in fp32 on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("trl")

import peft
import transformers
from accelerate import cpu_offload
from tiny import TINY
from tolerance import relative_error
from torch import nn

from focalkern import FusedFocalPOLoss, LinearLogps, linear_logps
from focalkern.trl.head import add_fused_lm_head, check_head, logit_scale_of, module_logps

VOCAB_SIZE = 300
OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs", "mean_logits_everywhere")
# Two ways to sum fp32 products of logits up to 30: measured 2e-6 at most, of values and of gradients.
TOLERANCE = 1e-5

ARCHITECTURES = {
    "Llama": {},
    "Llama, tied": {"tie_word_embeddings": True},
    "Gemma2": {"final_logit_softcapping": 1.0, "head_dim": 16},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "FalconH1, multiplied": {"lm_head_multiplier": 0.5},
    "HyperCLOVAX": {"logits_scaling": 0.5},
    "RecurrentGemma, capped": {
        "logits_soft_cap": 1.0,
        "lru_width": 32,
        "attention_window_size": 8,
        "num_hidden_layers": 3,
    },
    "Mpt, whose scale is not used": {"logit_scale": 3.0, "d_model": 32, "n_heads": 2, "n_layers": 1},
    "Mixtral, aux loss": {"num_local_experts": 4, "output_router_logits": True},
    "GptOss, aux loss": {"num_local_experts": 4, "output_router_logits": True, "head_dim": 16},
    "Phi, with a bias": {},
}


def built(name: str = "Llama", sharpness: float | None = None, **changes) -> transformers.PreTrainedModel:
    """A model of random weights with logits of some size, so that every transform is felt."""
    kind = name.partition(",")[0]
    options = {**TINY, "vocab_size": VOCAB_SIZE, **ARCHITECTURES.get(name, {}), **changes}
    if kind == "Mpt":
        options = {k: v for k, v in options.items() if k not in TINY}
    if kind == "FalconH1":
        options |= {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    head = model.get_output_embeddings()
    if sharpness is None:  # a tied head finds the token that was read
        sharpness = 5.0 if model.config.tie_word_embeddings else 20.0
    with torch.no_grad():
        head.weight.mul_(sharpness)
        if head.bias is not None:
            head.bias.normal_()
    return model


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Padding on the right, prompts of two lengths, a row without a label, and a label at the first token."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCAB_SIZE, (4, 12), generator=generator)
    attention = torch.ones_like(ids)
    attention[1, 8:] = attention[3, 10:] = 0
    labels = ids.masked_fill(attention == 0, -100)
    labels[0, :5] = labels[1, :3] = labels[2] = -100
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def expected_outputs(logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0) -> dict:
    """What a fused head returns, from the logits [S, T, V] of the model."""
    z = logits / temperature
    logps, mask, targets = z[:, :-1].log_softmax(-1), labels[:, 1:] != -100, labels[:, 1:].clamp(min=0)
    return {
        "log_probs": logps.gather(-1, targets[..., None])[..., 0] * mask,
        "entropy": -(logps.exp() * logps).sum(-1) * mask,
        "mean_logits": (z[:, :-1].mean(-1) * mask).detach(),
        "is_top1": (z[:, :-1].argmax(-1) == targets) & mask,
        "log_sum_sq_probs": ((2 * logps).logsumexp(-1) * mask).detach(),
        "mean_logits_everywhere": z.mean(-1).detach(),
    }


def own_logits(model, batch: dict) -> torch.Tensor:
    return model(**{name: x for name, x in batch.items() if name != "labels"}).logits


def expected_of(model, batch: dict, temperature: float = 1.0) -> dict:
    """From the model's own logits, before it has a fused head or beside it."""
    return expected_outputs(own_logits(model, batch), batch["labels"], temperature)


def assert_same_values(outputs, expected: dict) -> None:
    for name, value in expected.items():
        assert relative_error(outputs[name], value) < TOLERANCE, name
    assert expected["log_probs"].any()


def assert_same(outputs, expected: dict, parameters: list, their_parameters: list | None = None) -> None:
    """Every output, and the gradient of log-probs and entropies in every parameter."""
    assert_same_values(outputs, expected)
    if not outputs["log_probs"].requires_grad:
        return
    torch.manual_seed(2)
    weights = {name: torch.randn_like(expected[name]) for name in ("log_probs", "entropy")}
    ours, theirs = (
        torch.autograd.grad(
            sum((w * x[name]).sum() for name, w in weights.items()), wanted, materialize_grads=True
        )
        for x, wanted in ((outputs, parameters), (expected, their_parameters or parameters))
    )
    assert any(x.any() for x in theirs)
    for actual, exact in zip(ours, theirs, strict=True):
        assert relative_error(actual, exact) < TOLERANCE


# Models


@pytest.mark.parametrize(
    ("name", "temperature"),
    [*((name, 0.7) for name in ARCHITECTURES), ("Llama", 1.0), ("Gemma2", 1.0)],
)
def test_every_architecture_has_its_own_logits(name, temperature, batch):
    model = built(name)
    expected = expected_of(model, batch, temperature)
    add_fused_lm_head(model, temperature, outputs=OUTPUTS)
    outputs = model(**batch, fused_lm_head=True)
    assert_same(outputs, expected, list(model.parameters()))
    assert torch.equal(outputs.label_mask, batch["labels"][:, 1:] != -100)


def test_the_transforms_are_felt(batch):
    """Without them the logits would be others: the test above can fail."""
    del batch["labels"]
    for name in ("Gemma2", "Cohere", "Granite", "FalconH1, multiplied", "RecurrentGemma, capped"):
        model = built(name)
        hidden = model.base_model(**batch).last_hidden_state
        assert relative_error(model.get_output_embeddings()(hidden), model(**batch).logits) > 0.1


@pytest.mark.parametrize("name", ["Llama", "Mixtral, aux loss", "GptOss, aux loss"])
@pytest.mark.parametrize("count", [None, 7])
def test_the_loss_is_the_models_own(name, count, batch):
    model = built(name)
    extra = {} if count is None else {"num_items_in_batch": count}
    own = model(**batch, **extra)
    add_fused_lm_head(model)
    outputs = model(**batch, **extra, fused_lm_head=True)
    torch.testing.assert_close(outputs.loss, own.loss, rtol=TOLERANCE, atol=0)
    if "aux" in name:
        torch.testing.assert_close(outputs.aux_loss, own.aux_loss, rtol=TOLERANCE, atol=0)
        assert (own.loss - outputs.aux_loss * model.config.router_aux_loss_coef) != own.loss
    else:
        assert outputs.aux_loss is None


def test_the_number_of_experts_may_be_the_models(batch):
    """As GPT-OSS has it in transformers before 5.6."""
    model = built("GptOss, aux loss")
    own = model(**batch).aux_loss
    add_fused_lm_head(model)
    model.num_experts = model.config.num_experts
    config = model.config
    config.get_text_config = lambda *_, **__: _Without(config, "num_experts")
    outputs = model(**batch, fused_lm_head=True)
    torch.testing.assert_close(outputs.aux_loss, own, rtol=TOLERANCE, atol=0)


class _Without:
    def __init__(self, config, name):
        self._config, self._name = config, name

    def __getattr__(self, name):
        if name == self._name:
            raise AttributeError(name)
        return getattr(self._config, name)


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_shifted_labels_are_taken_as_they_are(name, batch):
    model = built(name)
    means = own_logits(model, batch).mean(-1)
    add_fused_lm_head(model, outputs=OUTPUTS)
    theirs = model(**batch, fused_lm_head=True)
    labels = batch.pop("labels")
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=5)
    ours = model(**batch, shift_labels=shifted, fused_lm_head=True)
    assert ours.log_probs.shape == labels.shape
    assert torch.equal(ours.log_probs[:, :-1], theirs.log_probs)
    assert relative_error(ours.mean_logits_everywhere, means) < TOLERANCE


def test_a_batch_without_labels_has_gradients_of_zero(batch):
    model = built()
    add_fused_lm_head(model)
    batch["labels"].fill_(-100)
    model(**batch, fused_lm_head=True).loss.backward()
    assert not model.lm_head.weight.grad.any()


def test_generation_is_untouched(batch):
    model, prompt = built(), batch["input_ids"][:1, :4]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    own, logits = model.generate(prompt, **options), model(**batch).logits
    add_fused_lm_head(model)
    assert torch.equal(model.generate(prompt, **options), own)
    assert torch.equal(model(**batch).logits, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fp32_head_of_a_bf16_model(dtype, batch):
    """With the head in bf16, or cast already, as GRPO does it."""
    model = built().bfloat16()
    model.lm_head.to(dtype)
    hidden = model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    expected = expected_outputs(hidden.float() @ model.lm_head.weight.float().T, batch["labels"])
    add_fused_lm_head(model, cast_lm_head_to_fp32=True, outputs=OUTPUTS)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**batch, fused_lm_head=True)
    assert_same_values(outputs, expected)


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_mean_logits_everywhere_are_fp32_under_autocast(name, batch):
    model = built(name)
    add_fused_lm_head(model, outputs=("mean_logits_everywhere",))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**batch, fused_lm_head=True)
        logits = own_logits(model, batch)
    assert outputs.mean_logits_everywhere.dtype == torch.float32
    # What bf16 logits are off by in the mean over the vocabulary
    assert relative_error(outputs.mean_logits_everywhere, logits.float().mean(-1)) < 1e-2


def test_offloaded_weights(batch):
    model = built()
    expected = expected_of(model, batch)
    add_fused_lm_head(model, outputs=OUTPUTS)
    cpu_offload(model, execution_device="cpu")
    assert model.lm_head.weight.is_meta
    with torch.no_grad():
        assert_same_values(model(**batch, fused_lm_head=True), expected)


def test_a_compiled_model(batch):
    model = built()
    add_fused_lm_head(model, outputs=OUTPUTS)
    own = model(**batch, fused_lm_head=True)
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph)
    assert torch.equal(compiled(**batch, fused_lm_head=True).log_probs, own.log_probs)
    assert graphs
    known = len(graphs)
    compiled(**batch, fused_lm_head=True)
    assert len(graphs) == known


# Hooks


def test_hooks_of_the_head_fire(batch):
    model, fired = built(), []
    head = model.lm_head

    def post(*_):
        fired.append("post")

    post.__module__ = "deepspeed.runtime"  # foreign ones are left out
    head.register_forward_pre_hook(lambda *_: fired.append("pre"))
    head.register_forward_hook(post)
    head.register_full_backward_pre_hook(lambda *_: fired.append("backward pre"))
    head.register_full_backward_hook(lambda *_: fired.append("backward"))
    add_fused_lm_head(model, outputs=OUTPUTS)
    own = copy.deepcopy(model)
    fired.clear()  # the model has been tried
    loss = model(**batch, fused_lm_head=True).loss
    assert fired == ["pre", "post"]
    loss.backward()
    assert fired == ["pre", "post", "backward pre", "backward"]
    assert "forward" not in vars(own.lm_head)
    assert type(model.lm_head(torch.zeros(1, 32))) is torch.Tensor


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
@pytest.mark.parametrize("adapter", [False, True], ids=["", "LoRA"])
def test_weights_that_are_there_only_inside_the_heads_calls(name, adapter, batch):
    """As DeepSpeed's ZeRO-3 does it: gathered by hooks before forward and backward, empty otherwise."""
    model = built(name, tie_word_embeddings=False)
    if adapter:
        model = with_lora(model).get_base_model()
    expected = expected_of(model, batch)
    head = model.get_output_embeddings()
    wanted = [x for x in head.parameters() if x.requires_grad]
    torch.manual_seed(2)
    weights = torch.randn_like(expected["log_probs"])
    theirs = torch.autograd.grad((weights * expected["log_probs"]).sum(), wanted)
    add_fused_lm_head(model, outputs=OUTPUTS)

    for module in head.modules():
        for parameter in module.parameters(recurse=False):
            _partition(module, parameter)
    assert all(x.numel() == 0 for x in head.parameters())
    outputs = model(**batch, fused_lm_head=True)
    assert all(x.numel() == 0 for x in head.parameters())
    assert_same_values(outputs, expected)
    ours = torch.autograd.grad((weights * outputs.log_probs).sum(), wanted)
    for actual, exact in zip(ours, theirs, strict=True):
        assert relative_error(actual, exact) < TOLERANCE


def _partition(module: nn.Module, parameter: nn.Parameter) -> None:
    whole, empty = parameter.data, parameter.data.new_empty(0)

    class GatherForBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, output):
            return output.detach()

        @staticmethod
        def backward(ctx, gradient):
            parameter.data = whole
            return gradient

    def gather(*_):
        parameter.data = whole

    def release(module, args, output):
        parameter.data = empty
        if isinstance(output, torch.Tensor):
            return GatherForBackward.apply(output)
        return tuple(x if x is None else GatherForBackward.apply(x) for x in output)

    release.__module__ = "deepspeed.runtime"
    parameter.data = empty
    module.register_forward_pre_hook(gather)
    module.register_forward_hook(release)


# Adapters


def with_lora(model, **options):
    torch.manual_seed(3)
    options = {"target_modules": ["lm_head", "q_proj"], "init_lora_weights": False, **options}
    return peft.get_peft_model(model, peft.LoraConfig(r=4, **options)).eval()


def two_adapters(model):
    model = with_lora(model, lora_alpha=16)
    other = peft.LoraConfig(r=3, target_modules=["lm_head"], lora_bias=True, init_lora_weights=False)
    model.add_adapter("other", other)
    model.base_model.set_adapter(["default", "other"])
    return model.eval()


def saved(model):
    model = with_lora(model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.mul_(1.5)
    return model


def merged(model):
    model.merge_adapter()
    return model


def disabled(model):
    model.base_model.disable_adapter_layers()
    return model


ADAPTERS = {
    "LoRA": with_lora,
    "dropout, evaluated": lambda model: with_lora(model, lora_dropout=0.3),
    "dropout, trained": lambda model: with_lora(model, lora_dropout=0.3).train(),
    "rsLoRA": lambda model: with_lora(model, use_rslora=True),
    "with a bias": lambda model: with_lora(model, lora_bias=True),
    "two": two_adapters,
    "disabled": lambda model: disabled(with_lora(model)),
    "merged": lambda model: merged(with_lora(model)),
    "disabled and merged": lambda model: disabled(merged(with_lora(model))),
    "modules_to_save": saved,
    "modules_to_save, disabled": lambda model: disabled(saved(model)),
}


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        *((name, "Llama") for name in ADAPTERS),
        *((name, "Gemma2") for name in ("LoRA", "two", "merged", "modules_to_save")),
        *((name, "Phi, with a bias") for name in ("LoRA", "with a bias", "disabled", "modules_to_save")),
    ],
)
def test_adapters_of_the_head_are_pefts(name, architecture, batch):
    model = ADAPTERS[name](built(architecture))
    twin = copy.deepcopy(model)  # a forward of PEFT's may unmerge what is disabled
    torch.manual_seed(4)
    expected = expected_of(twin, batch)
    add_fused_lm_head(model.get_base_model(), outputs=OUTPUTS)
    torch.manual_seed(4)
    outputs = model(**batch, fused_lm_head=True)
    assert outputs.log_probs.requires_grad == expected["log_probs"].requires_grad
    ours, theirs = ([x for x in of.parameters() if x.requires_grad] for of in (model, twin))
    assert_same(outputs, expected, ours, theirs)


def test_an_adapter_is_felt_from_the_next_forward_on(batch):
    """Switched on and off after the head was added: as TRL's reference of an adapter is."""
    model = with_lora(built())
    add_fused_lm_head(model.get_base_model())
    on = model(**batch, fused_lm_head=True).log_probs
    with model.disable_adapter():
        off = model(**batch, fused_lm_head=True).log_probs
        expected = expected_of(model, batch)["log_probs"]
    assert relative_error(off, expected) < TOLERANCE
    assert relative_error(on, expected) > 0.01


def test_an_adapter_in_fp32_on_a_bf16_model(batch):
    """PEFT's default: as good as PEFT's own logits, which are bf16."""
    model = with_lora(built().bfloat16())
    assert model.get_output_embeddings().lora_A["default"].weight.dtype == torch.float32
    exact = expected_of(copy.deepcopy(model).double(), batch)["log_probs"]
    own = expected_outputs(own_logits(model, batch).double(), batch["labels"])["log_probs"]
    add_fused_lm_head(model.get_base_model())
    ours = model(**batch, fused_lm_head=True).log_probs
    assert relative_error(ours, exact) <= 1.5 * relative_error(own, exact)


HEAD = {"target_modules": ["lm_head"]}


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        ("Lora", {**HEAD, "use_dora": True}, "'default' is DoraLinearVariant"),
        ("IA3", {**HEAD, "feedforward_modules": []}, "ia3.layer.Linear"),
        ("LoHa", HEAD, "loha.layer.Linear"),
        ("Vera", {**HEAD, "r": 4}, "vera.layer.Linear"),
        ("AdaLora", {**HEAD, "total_step": 10}, "adalora.layer.SVDLinear"),
        ("Lora", {"target_modules": [], "target_parameters": ["lm_head.weight"]}, "ParamWrapper"),
    ],
)
def test_what_is_no_lora_is_refused_by_name(kind, options, match):
    model = peft.get_peft_model(built(), getattr(peft, f"{kind}Config")(**options))
    with pytest.raises(TypeError, match=match):
        add_fused_lm_head(model.get_base_model())


def test_dora_that_is_not_active_yet_is_refused():
    model = with_lora(built())
    model.add_adapter("other", peft.LoraConfig(target_modules=["lm_head"], use_dora=True))
    with pytest.raises(TypeError, match="'other' is DoraLinearVariant"):
        check_head(model.get_base_model())


@pytest.mark.parametrize(
    ("head", "match"),
    [
        (nn.Sequential(nn.Linear(32, VOCAB_SIZE)), "torch.nn.Linear.*Sequential"),
        (transformers.pytorch_utils.Conv1D(VOCAB_SIZE, 32), "Conv1D"),
        (None, "NoneType"),
    ],
)
def test_heads_that_are_not_linear_are_refused(head, match):
    model = built()
    model.get_output_embeddings = lambda: head
    with pytest.raises(TypeError, match=match):
        add_fused_lm_head(model)


def test_a_quantised_head_is_refused():
    model = built()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"quantised.*int8"):
        add_fused_lm_head(model)


# Options


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"backward": "fast"}, ValueError, "backward"),
        ({"tau": -1.0}, ValueError, "tau"),
        ({"backend": "jax"}, ValueError, "backend"),
        ({"outputs": ("logits",)}, ValueError, "outputs.*logits"),
    ],
)
def test_options_are_checked_at_once(options, error, match):
    model = built()
    own = model.forward
    with pytest.raises(error, match=match):
        add_fused_lm_head(model, **options)
    assert model.forward == own


def test_a_scale_in_words_is_refused_by_the_name_of_its_field():
    with pytest.raises(TypeError, match=r"logit_scale.*config.*inv_sqrt_d_model"):
        add_fused_lm_head(built("Mpt", logit_scale="inv_sqrt_d_model", d_model=32, n_heads=2, n_layers=1))


def test_a_padded_vocabulary_that_the_model_cuts_off_is_refused():
    model = built()
    model.config.unpadded_vocab_size = VOCAB_SIZE - 8
    with pytest.raises(ValueError, match="unpadded_vocab_size must be vocab_size, 300; got 292"):
        add_fused_lm_head(model)


def test_a_scale_of_zero_is_one_that_counts():
    config = transformers.CohereConfig(logit_scale=0.0)
    assert logit_scale_of(config) == 0.0


def test_options_reach_the_operator(batch):
    model = built(vocab_size=3000, sharpness=200.0)
    add_fused_lm_head(model, backward="certified", tau=0.1)
    outputs = model(**batch, fused_lm_head=True)
    outputs.loss.backward()
    hidden = model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    tokens = linear_logps(hidden, model.lm_head.weight, batch["labels"], shift=True, tau=0.1)
    (-tokens.logps.sum() / outputs.label_mask.sum()).backward()
    assert 0 < outputs.kept_share < 1
    assert outputs.kept_share == tokens.kept_share
    assert torch.equal(outputs.dropped_mass, tokens.dropped_mass)

    add_fused_lm_head(model, backward="exact")
    assert model(**batch, fused_lm_head=True).dropped_mass is None


def test_labels_on_the_host_stay_there(batch, monkeypatch):
    """Whatever the device of hidden: on one that computes, the forward would wait to look at them."""
    given = []

    def recorded(hidden, weight, labels, **options):
        given.append((hidden.device.type, labels.device.type))
        return LinearLogps(torch.zeros(labels.shape))

    monkeypatch.setattr("focalkern.trl.head.linear_logps", recorded)
    head, hidden = nn.Linear(8, VOCAB_SIZE, device="meta"), torch.empty(4, 12, 8, device="meta")
    for labels in (batch["labels"], batch["labels"].to("meta")):
        module_logps(
            head, hidden, labels, shift=True, in_fp32=False, options={"outputs": (), "softcap": None}
        )
    assert given == [("meta", "cpu"), ("meta", "meta")]


def test_labels_must_be_given(batch):
    model = built()
    add_fused_lm_head(model)
    del batch["labels"]
    with pytest.raises(ValueError, match="labels must be given"):
        model(**batch, fused_lm_head=True)


# Models whose logits the head does not know


WITHOUT_GROUPS = {name: value for name, value in TINY.items() if name != "num_key_value_heads"}


def modernbert_decoder():
    ids = {f"{name}_token_id": 0 for name in ("bos", "eos", "cls", "sep")}
    sizes = {**WITHOUT_GROUPS, **ids, "global_attn_every_n_layers": 1, "vocab_size": VOCAB_SIZE}
    return transformers.ModernBertDecoderForCausalLM(transformers.ModernBertDecoderConfig(**sizes)).eval()


def roberta():
    config = transformers.RobertaConfig(vocab_size=VOCAB_SIZE, is_decoder=True, **WITHOUT_GROUPS)
    return transformers.RobertaForCausalLM(config).eval()


def llama_with_a_scale_of_its_own():
    model = built()
    model.config.logit_scale = 2.0  # which Llama does not look at
    return model


@pytest.mark.parametrize("make", [modernbert_decoder, roberta, llama_with_a_scale_of_its_own])
def test_a_model_that_makes_something_else_of_its_last_hidden_state_is_refused(make):
    with pytest.raises(TypeError, match="must take its logits from the last hidden state"):
        add_fused_lm_head(make())


def test_trying_a_model_changes_nothing_about_it():
    model = built(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    add_fused_lm_head(model)
    assert torch.rand(()) == expected
    assert [module.training for module in model.modules()] == modes
    assert not model.model._forward_hooks


def test_a_sharded_model_is_taken_untried():
    model = built()
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)
    add_fused_lm_head(model)


def test_a_copy_of_a_model_has_a_forward_of_its_own(batch):
    model = built()
    add_fused_lm_head(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    for options in ({}, {"fused_lm_head": True}):
        outputs = copied(**batch, **options)
        found = outputs.logits if not options else outputs.log_probs[batch["labels"][:, 1:] != -100].exp()
        torch.testing.assert_close(found, torch.full_like(found, 0.0 if not options else 1 / VOCAB_SIZE))
    assert model(**batch).logits.any()


@pytest.mark.parametrize("adapter", [False, True], ids=["", "LoRA"])
def test_a_head_whose_class_its_engine_has_replaced(adapter, batch):
    """As FSDP2 does it: a class of its own over that of the module."""
    model = built()
    model = with_lora(model).get_base_model() if adapter else model
    expected = expected_of(model, batch)
    add_fused_lm_head(model, outputs=OUTPUTS)
    head = model.get_output_embeddings()
    for module in head.modules():
        name = f"Sharded{type(module).__name__}"
        module.__class__ = type(name, (type(module),), {"__module__": "abc"})
    outputs = model(**batch, fused_lm_head=True)
    assert relative_error(outputs.log_probs, expected["log_probs"]) < TOLERANCE


def test_the_certificate_of_a_loss_on_its_log_probs_is_that_of_the_backward(batch):
    model, tau = built(sharpness=60.0, vocab_size=4096), 1e-2
    add_fused_lm_head(model, tau=tau)
    ids, labels = batch["input_ids"], batch["labels"].masked_fill(torch.arange(12) == 0, -100)
    labels[2, 5:] = ids[2, 5:]
    refs = {"ref_chosen_logps": torch.zeros(2), "ref_rejected_logps": torch.zeros(2)}
    loss_fn = FusedFocalPOLoss(tau=tau)
    outputs = model(ids, attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True)
    out = loss_fn.from_logps(outputs.token_logps(), labels, **refs, shift=True)
    out.loss.backward()
    hidden = model.model(ids, attention_mask=batch["attention_mask"]).last_hidden_state
    direct = loss_fn(hidden, model.lm_head.weight, labels, **refs, shift=True)
    direct.loss.backward()
    assert 0 < out.kept_share < 1
    assert out.certificate() == direct.certificate()
    assert out.certificate().max_dropped_mass > 0
