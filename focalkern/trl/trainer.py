"""`FocalPOTrainer`: TRL's DPOTrainer with every objective of the library, on the fused head."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import transformers.trainer
from accelerate import PartialState
from accelerate.utils import is_peft_model, send_to_device
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import dpo_trainer
from trl.trainer.utils import get_config_model_id, use_adapter

from focalkern.logps.operator import LinearLogps
from focalkern.pairs.focalpo import FusedFocalPOLoss
from focalkern.schedules import GammaSchedule
from focalkern.shared_prompts import shared_attention_mask
from focalkern.trl.batches import TokenBatchSampler, check_longest, tokens_of, weighted_mean
from focalkern.trl.card import PAPERS, complete_card, methods_of
from focalkern.trl.collator import REF_LOGPS
from focalkern.trl.config import FocalPOConfig
from focalkern.trl.data import STREAMED_ROWS, DataReport, as_trl_takes_it, inspect_pairs
from focalkern.trl.head import (
    FusedHeadOutput,
    NoAdapter,
    add_fused_lm_head,
    replaced,
)
from focalkern.trl.metrics import backward_metrics, logged_pair_metrics, margin_metrics, token_metrics
from focalkern.trl.mixed_loss import MixedLoss
from focalkern.trl.packing import check_packing, collator_of, layout_of, prepare_model
from focalkern.trl.sharding import check_sequences_are_whole, keep_output_dtype

STATE_NAME = "focalpo_state.pt"
_NARROW = (torch.bfloat16, torch.float16)
# An update of AdamW is about as large as the learning rate: below this it is lost in a bf16 weight of 0.02.
_LOST_IN_BF16 = 2e-5
# What a batch holds beside the arguments of the model.
_NOT_FOR_THE_MODEL = (
    "completion_mask",
    "completion_lengths",
    *REF_LOGPS,
    "sequence_lengths",
    "cu_seqlens",
    "seen_until",
    "hidden_index",
    "completion_labels",
)


def _option(name: str) -> Any:
    """An attribute that the loss of TRL's trainer reads at every step. It is kept by the loss that runs."""

    def get(trainer: FocalPOTrainer) -> Any:
        value = getattr(trainer.loss_fn.options, name)
        return tuple(value) if name == "loss_type" else value  # a list would invite changes in place

    def change(trainer: FocalPOTrainer, value: Any) -> None:
        trainer.loss_fn.set_option(name, value)

    return property(get, change)


class FocalPOTrainer(DPOTrainer):
    """TRL's `DPOTrainer` for FocalPO, DynamicFocalPO, α-DPO, SimPO and their combinations, on the fused head.

        trainer = FocalPOTrainer(model, args=FocalPOConfig("out", gamma=0.05), train_dataset=dataset)
        trainer.train()

    Arguments are those of `DPOTrainer`, with a `FocalPOConfig`. The reference is TRL's too: `ref_model`, the
    model of the same name, the adapter's base, or log-probs computed in advance; where the loss needs none
    (SimPO), there is none. An adapter may be on `lm_head` (plain LoRA). `padding_free=True` concatenates the
    sequences of a batch, `share_prompt=True` computes the prompt of a pair once. Callbacks may set `beta`,
    `loss_weights` and the other attributes that TRL's loss reads, with the effect that they have there.

    With `max_tokens_per_batch` batches differ in their number of pairs. The loss of an optimizer step is the
    mean over its pairs on all ranks and in all accumulated batches. Logged metrics weigh batches by pairs.

    When it is made, it counts in the data the pairs that are dropped, cut, empty or identical, with BOS twice
    or without EOS, prints the counts and one pair, and keeps them as `data_reports`.

    Logged beside TRL's metrics, where the loss has them: `focal/gamma`, `focal/weight` (mean −dL/du),
    `focal/flipped` (share of pairs that are pushed together), `focal/dropped_mass` and `focal/kept_share` (of
    the certified backward, in training), `alpha/mean` and `alpha/std` (μ and σ of α-DPO). Rewards are
    β·score, so with `length_normalize` and `reference_free` those of SimPO.

    Raises:
        ValueError, TypeError: naming the field or the argument.
    """

    _tag_names = ["trl", "focalpo", "focalkern"]  # noqa: RUF012  # a list in TRL
    args: FocalPOConfig
    beta = _option("beta")
    loss_types = _option("loss_type")
    loss_weights = _option("loss_weights")
    label_smoothing = _option("label_smoothing")
    ld_alpha = _option("ld_alpha")
    f_divergence_type = _option("f_divergence_type")
    f_alpha_divergence_coef = _option("f_alpha_divergence_coef")
    use_weighting = _option("use_weighting")
    data_reports: dict[str, DataReport]  # "train", "eval" or the names of several
    _total_train_tokens: torch.Tensor | int  # of all ranks; on the device while training
    _precompute_model_hash: str | None

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: FocalPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        **trl_options: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = FocalPOConfig(f"{name.split('/')[-1]}-FocalPO")
        if not isinstance(args, FocalPOConfig):
            raise TypeError(f"args must be a FocalPOConfig; got {type(args).__name__}")
        if train_dataset is None:
            raise ValueError("train_dataset must be given; got None")
        sample = next(iter(train_dataset), None)
        if sample is None:
            raise ValueError("the train dataset must hold pairs; it is empty")
        if args.max_tokens_per_batch is not None and not isinstance(train_dataset, Dataset):
            raise ValueError(
                "max_tokens_per_batch must be None with a train_dataset that is streamed: its lengths must be"
                f" known; got a {type(train_dataset).__name__}"
            )
        self.data_reports = {}
        _check_reference(args, model, ref_model, peft_config)
        if args.gamma_schedule is not None and args.max_steps <= 0 and not has_length(train_dataset):
            raise ValueError(
                "max_steps must be given: gamma_schedule is spread over the steps of the training, and a "
                "train_dataset without a length does not tell them"
            )
        self._is_packed = layout_of(args) is not None
        if self._is_packed:
            check_packing(args, model, sample, data_collator, compute_metrics, peft_config)
            data_collator = collator_of(args)
        self.loss_fn = MixedLoss(args)
        self._left_out: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None

        own_adapters = set() if isinstance(model, str) or not is_peft_model(model) else set(model.peft_config)
        with self._construction(model, args):
            padding_free, args.padding_free = args.padding_free, False  # TRL's is switched off, and says so
            try:
                super().__init__(
                    model=model,
                    ref_model=ref_model,
                    args=args,
                    data_collator=data_collator,
                    train_dataset=train_dataset,
                    eval_dataset=eval_dataset,
                    processing_class=processing_class,
                    compute_metrics=compute_metrics,
                    callbacks=callbacks,
                    optimizers=optimizers,
                    quantization_config=quantization_config,
                    peft_config=peft_config,
                    **trl_options,
                )
            finally:
                args.padding_free = padding_free
        if own_adapters and not args.needs_reference and "ref" in set(self.model.peft_config) - own_adapters:
            self.model.delete_adapter("ref")  # the copy that TRL makes of the user's for a reference
        self.padding_free = padding_free
        self._token_batches: TokenBatchSampler | None = None
        if args.max_tokens_per_batch is not None:
            self._token_batches = self._token_batch_sampler()
            self.loss_is_scaled_for_ga = True  # by compute_loss
        self._gamma_steps: _GammaSteps | None = None
        if args.gamma_schedule is not None and self.loss_fn.focal is not None:
            self._gamma_steps = _GammaSteps(self.loss_fn.focal, args.gamma_schedule_steps)
            self.add_callback(self._gamma_steps)
        self._warn_of_lost_updates()

    # ------------------------------------------------------------------------------------------ construction

    def create_accelerator_and_postprocess(self) -> None:
        check_sequences_are_whole(self.args.parallelism_config)
        super().create_accelerator_and_postprocess()
        check_sequences_are_whole(self.accelerator.parallelism_config)  # of the launcher's, too
        keep_output_dtype(self.accelerator.state)

    def _warn_of_lost_updates(self) -> None:
        """Engines keep an fp32 copy of 16-bit weights; a plain optimizer does not."""
        dtypes = {p.dtype for p in self.model.parameters() if p.requires_grad}
        # FSDP makes that copy only where it mixes precisions.
        has_copy = self.is_deepspeed_enabled or (
            self.is_fsdp_enabled and self.accelerator.mixed_precision != "no"
        )
        if has_copy or dtypes.isdisjoint(_NARROW):
            return
        if self.args.learning_rate < _LOST_IN_BF16:
            warnings.warn(
                f"Weights in 16 bits lose most updates of learning_rate={self.args.learning_rate:g}: load the"
                " model in float32 (bf16=True is autocast, and does the rest), or train adapters",
                stacklevel=3,
            )

    @contextlib.contextmanager
    def _construction(self, model: Any, args: FocalPOConfig) -> Iterator[None]:
        """While TRL's constructor runs: our head for its own, adapters on the head, no needless reference."""

        def add_head(model: Any, *, outputs: tuple[str, ...] = ("log_probs",)) -> None:
            # Policy and reference come here before anything is computed with them, or sharded.
            if self._is_packed:
                if args.share_prompt and self.aux_loss_enabled:
                    raise ValueError(
                        "router_aux_loss_coef must be 0 with share_prompt=True: the load-balancing loss"
                        f" counts the tokens of both prompts; got {self.router_aux_loss_coef}"
                    )
                base = model.get_base_model() if is_peft_model(model) else model
                # DeepSpeed casts the weights instead.
                is_autocast = self.accelerator.mixed_precision != "no" and not self.is_deepspeed_enabled
                logits_of = functools.partial(self._logits, base)
                prepare_model(base, self.data_collator, self.args.device, is_autocast, logits_of)
            add_fused_lm_head(
                model, outputs=outputs, backward=args.backward, tau=args.tau, backend=args.backend
            )

        create = dpo_trainer.create_model_from_path
        models_left = int(isinstance(model, str)) + int(args.needs_reference)

        def create_model(*given: Any, **kwargs: Any) -> Any:
            nonlocal models_left
            models_left -= 1
            return create(*given, **kwargs) if models_left >= 0 else None

        names: dict[str, Any] = {"add_fused_lm_head": add_head, "create_model_from_path": create_model}
        if hasattr(dpo_trainer, "BaseTunerLayer"):  # there is one if peft is
            names["BaseTunerLayer"] = NoAdapter
        with replaced(dpo_trainer, **names):
            yield

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: Any,
        args: FocalPOConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        dataset = as_trl_takes_it(dataset, dataset_name)
        prepare = functools.partial(
            super()._prepare_dataset,
            processing_class=processing_class,
            args=args,
            dataset_name=dataset_name,
        )
        prepared = prepare(dataset)
        is_stream = not isinstance(dataset, Dataset)
        rows = Dataset.from_list(list(dataset.take(STREAMED_ROWS))) if is_stream else dataset
        report = inspect_pairs(
            prepare(rows) if is_stream else prepared,
            len(rows),
            dataset_name,
            self._tokenizer,
            args.max_length,
            args.truncation_mode,
            is_sample=is_stream,
        )
        report.check(args.loss_type, args.length_normalize)
        if dataset_name == "train" and args.max_tokens_per_batch is not None:
            check_longest(tokens_of(prepared, args), args.max_tokens_per_batch)
        if dataset_name not in self.data_reports and PartialState().is_main_process:
            print(report)
            for message in report.warnings():
                warnings.warn(message, stacklevel=4)  # of whoever makes the trainer
        self.data_reports.setdefault(dataset_name, report)
        return prepared

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if self.accelerator.num_processes > 1 and not getattr(dataset, "cache_files", True):
            raise ValueError(
                f"precompute_ref_log_probs must be False on several ranks with a {name} dataset in memory,"
                " which they cannot share: load it from files (load_dataset, load_from_disk)"
            )
        # TRL looks its cache up by dataset and model: log-probs of sequences cut otherwise pass for these.
        args, of_model = self.args, self._precompute_model_hash
        options = (args.max_length, args.truncation_mode, args.ld_alpha, self.accelerator.mixed_precision)
        self._precompute_model_hash = Hasher.hash((of_model, options, layout_of(args)))
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precompute_model_hash = of_model

    # ------------------------------------------------------------------------------------ batches by tokens

    def _token_batch_sampler(self) -> TokenBatchSampler:
        args = self.args
        assert args.max_tokens_per_batch is not None
        return TokenBatchSampler(
            tokens_of(self.train_dataset, args),
            args.max_tokens_per_batch,
            ranks=args.world_size // self.get_tp_size(),
            seed=args.seed if args.data_seed is None else args.data_seed,
        )

    def get_train_dataloader(self) -> DataLoader:
        if self._token_batches is None:
            return super().get_train_dataloader()
        sampler = self._token_batches = self._token_batch_sampler()  # the data may be others by now

        def by_tokens(dataset: Dataset, **options: Any) -> DataLoader:
            for name in ("batch_size", "sampler", "drop_last"):
                options.pop(name, None)
            return DataLoader(dataset, batch_sampler=sampler, **options)

        with (
            replaced(transformers.trainer, DataLoader=by_tokens),
            replaced(self.accelerator, even_batches=False),  # nothing to even out; some versions insist
        ):
            loader = super().get_train_dataloader()
        # Where accelerate's `set_epoch` looks for it, also in a training that is resumed on several ranks.
        loader.set_sampler(sampler)  # type: ignore[attr-defined]
        return loader

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Pairs of an optimizer step on all ranks; on average, rounded, with `max_tokens_per_batch`."""
        sampler = self._token_batches
        if sampler is None:
            return super().get_total_train_batch_size(args)
        batches = args.gradient_accumulation_steps * (args.world_size // self.get_tp_size())
        return max(round(sampler.pairs * batches / len(sampler)), 1)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, torch.Tensor | int | None]:
        batches, items = super().get_batch_samples(*args, **kwargs)
        if self._token_batches is not None:
            pairs = sum(map(_pairs_in, batches))
            items = self._sum_over_ranks(torch.full((), pairs, device=self.args.device))
        return batches, items

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """TRL's; with `max_tokens_per_batch`, times the share of this batch in the pairs of the step."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._token_batches is None or num_items_in_batch is None:
            return loss
        # Times the ranks, over which gradients are averaged.
        return loss * (_pairs_in(inputs) * self.args.world_size / num_items_in_batch)

    # ------------------------------------------------------------------------------------------------ a step

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # Under DeepSpeed floats are cast to the dtype of the model: sums of log-probs would be off by nats.
        ref_logps = {name: inputs[name].to(self.args.device) for name in REF_LOGPS if name in inputs}
        return super()._prepare_inputs(inputs) | ref_logps

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        outputs = self._forward(model, inputs, output_router_logits=self.aux_loss_enabled)
        tokens, labels, cu_seqlens = self._pair_tokens(outputs, inputs)
        refs = self._reference_logps(inputs, tokens.logps.device)
        self.loss_fn.train(self.model.training)  # statistics move in training alone
        lengths = self._completion_lengths(inputs).to(labels.device)
        loss, out = self.loss_fn(tokens, labels, refs, cu_seqlens, lengths)
        aux_loss = None
        if self.aux_loss_enabled:
            aux_loss = outputs.aux_loss
            loss = loss + self.router_aux_loss_coef * aux_loss

        metrics = token_metrics(tokens, labels, cu_seqlens, self._sum_over_ranks)
        pair_metrics, pairs = logged_pair_metrics(out, self._sum_over_ranks)
        metrics |= pair_metrics
        focal = self.loss_fn.focal
        if focal is not None and focal.alpha and focal.normalize_margin:
            metrics |= margin_metrics(focal.margin_statistics)
        if aux_loss is not None:
            metrics["aux_loss"] = self._sum_over_ranks(aux_loss.detach() * (len(out.lengths) // 2)) / pairs
        # Batches by tokens differ in their pairs.
        weight = pairs if self._token_batches is not None and self.model.training else None
        self._record(metrics, weight, self._token_count(inputs))
        if outputs.dropped_mass is not None and outputs.kept_share is not None and torch.is_grad_enabled():
            self._left_out = (outputs.dropped_mass, outputs.kept_share, out.lengths.sum(), weight)
        if not return_outputs:
            return loss
        if self._is_packed:
            raise ValueError(
                f"{layout_of(self.args)} must be False for predict(): its rows have no logits per sequence"
            )
        # As in TRL: the logits that `compute_metrics` takes, from a second forward.
        with torch.no_grad():
            return loss, model(**self._model_inputs(model, inputs))

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self._left_out is not None:
            dropped_mass, kept_share, tokens, weight = self._left_out
            self._record(backward_metrics(dropped_mass, kept_share, tokens, self._sum_over_ranks), weight)
            self._left_out = None
        return loss

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Reference log-probs of a batch, [B] each: sums over completion tokens, as the loss takes them."""
        adapter: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            unwrapped = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(unwrapped, "ref" if "ref" in unwrapped.peft_config else None)
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            adapter,
            self.accelerator.autocast(),
        ):
            outputs = self._forward(model, inputs)
        return self.loss_fn.reference_logps(*self._pair_tokens(outputs, inputs))

    def _reference_logps(
        self, inputs: dict[str, Any], device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if not self.args.needs_reference:
            return None, None
        if self.precompute_ref_logps:
            chosen, rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            if self.ref_model is None and not is_peft_model(self.model):
                raise ValueError(
                    "ref_model is None: give the trainer one, or leave precompute_ref_logps as it was"
                )
            chosen, rejected = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        return chosen.to(device), rejected.to(device)

    def _forward(
        self, model: Any, inputs: dict[str, Any], output_router_logits: bool = False
    ) -> FusedHeadOutput:
        kwargs = self._model_inputs(model, inputs)
        if "hidden_index" in inputs:
            kwargs["hidden_index"] = inputs["hidden_index"]
        if output_router_logits:  # not every model knows the argument
            kwargs["output_router_logits"] = True
        return model(**kwargs, labels=self._labels(inputs), fused_lm_head=True)

    def _model_inputs(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        kwargs = {k: v for k, v in inputs.items() if k not in _NOT_FOR_THE_MODEL} | {"use_cache": False}
        config = self.accelerator.unwrap_model(model).config
        if "seen_until" in inputs:
            kwargs["attention_mask"] = shared_attention_mask(
                config, inputs["position_ids"], inputs["seen_until"]
            )
        if self.args.share_prompt and getattr(config, "output_router_logits", False):
            kwargs["output_router_logits"] = False  # the loss of them takes no mask of this kind
        return kwargs

    def _logits(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """Without autocast, and where the model is: it may be moved later."""
        inputs = send_to_device(batch, model.get_input_embeddings().weight.device)
        return model(**self._model_inputs(model, inputs)).logits

    @staticmethod
    def _labels(inputs: dict[str, Any]) -> torch.Tensor:  # [2B, T], or packed [1, N]
        """Input ids with all but the completions masked."""
        if "completion_labels" in inputs:
            return inputs["completion_labels"]
        return inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)

    @staticmethod
    def _completion_lengths(inputs: dict[str, Any]) -> torch.Tensor:  # [2B]
        """As TRL counts: with a first token that nothing predicts."""
        return inputs["completion_lengths"] if "cu_seqlens" in inputs else inputs["completion_mask"].sum(1)

    def _pair_tokens(
        self, outputs: FusedHeadOutput, inputs: dict[str, Any]
    ) -> tuple[LinearLogps, torch.Tensor, torch.Tensor | None]:
        """What the losses take: log-probs, labels [2B, T] or packed [N], and then cu_seqlens [2B + 1].

        All are on the device of the head, which may not be that of the inputs.
        """
        tokens = outputs.token_logps()
        labels = self._labels(inputs).to(tokens.logps.device)
        cu_seqlens = inputs.get("cu_seqlens")
        if cu_seqlens is not None:  # [1, N − 1] to [N]: the last position predicts nothing
            tokens = tokens.reshaped(lambda x: torch.nn.functional.pad(x[0], (0, 1)))
            return tokens, labels[0], cu_seqlens.to(labels.device)
        length = labels.shape[1] - 1
        if tokens.logps.shape[1] > length:  # prompt learning puts its own tokens in front
            tokens = tokens.reshaped(lambda x: x[:, -length:])
        return tokens, labels, None

    # ----------------------------------------------------------------------------------------------- logging

    def _record(
        self,
        metrics: dict[str, torch.Tensor],
        weight: torch.Tensor | None,  # [] of these values in a mean over batches; None, where all are equal
        tokens: torch.Tensor | None = None,
    ) -> None:
        mode = "train" if self.model.training else "eval"
        for name, value in metrics.items():
            self._metrics[mode][name].append(value.detach() if weight is None else (value.detach(), weight))
        if tokens is None:
            return
        if mode == "train":
            self._total_train_tokens = self._total_train_tokens + tokens // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # What is recorded in training goes on to be while an evaluation is logged.
        for values in self._metrics["train" if self.model.training else "eval"].values():
            if values and isinstance(values[0], tuple):
                values[:] = [weighted_mean(values)]
            values[:] = [x.item() if isinstance(x, torch.Tensor) else x for x in values]
        super().log(logs, start_time)

    def _token_count(self, inputs: dict[str, Any]) -> torch.Tensor:
        counted = inputs["sequence_lengths" if self._is_packed else "attention_mask"]
        return self._sum_over_ranks(counted.sum()[None])[0]

    def _sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, "sum")

    # ------------------------------------------------------------------------------------------- checkpoints

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        names = methods_of(self.args)
        self._name = " and ".join(names)
        citations = [PAPERS[name].citation for name in names if name in PAPERS]
        self._paper = {"citation": "\n\n".join(citations)}
        on_hub = dataset_name and not os.path.exists(dataset_name)
        super().create_model_card(model_name, dataset_name if on_hub else None, tags)
        if self.is_world_process_zero():
            complete_card(
                os.path.join(self.args.output_dir, "README.md"),
                self.args,
                self.state,
                get_config_model_id(self.model.config),
                dataset_name,
                self.get_total_train_batch_size(self.args),
            )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = {"loss_fn": self.loss_fn.state_dict(), "num_tokens": int(self._total_train_tokens)}
            if self._gamma_steps is not None:
                state["gamma_steps"] = self._gamma_steps.current
            if self._token_batches is not None:
                state["token_batches"] = self._token_batches.fingerprint
            torch.save(state, os.path.join(output_dir, STATE_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, STATE_NAME)
        focal = self.loss_fn.focal
        if focal is not None and focal.alpha and not os.path.exists(path):
            warnings.warn(
                f"{STATE_NAME} is not in {checkpoint}: the running statistics of alpha-DPO start anew"
                " (save_only_model=True does not write it)",
                stacklevel=2,
            )
        if os.path.exists(path):  # not in a checkpoint of TRL's own trainer
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.loss_fn.load_state_dict(state["loss_fn"])
            self._total_train_tokens = state["num_tokens"]
            if self._gamma_steps is not None:
                self._gamma_steps.saved = state.get("gamma_steps")
            batches = None if self._token_batches is None else self._token_batches.fingerprint
            if state.get("token_batches") != batches:
                warnings.warn(
                    f"max_tokens_per_batch={self.args.max_tokens_per_batch} does not make the batches of"
                    f" {checkpoint}: the epoch that is resumed repeats pairs and leaves others out",
                    stacklevel=2,
                )


class _GammaSteps(TrainerCallback):
    """Moves γ(t) with every optimizer step, over all steps of the training where no other number is given."""

    def __init__(self, focal: FusedFocalPOLoss, total_steps: int | None) -> None:
        self.focal = focal
        self.total_steps = total_steps
        self.saved: int | None = None  # of the checkpoint that the training resumes

    @property
    def current(self) -> int:
        assert isinstance(self.focal.gamma, GammaSchedule)
        return self.focal.gamma.total_steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        steps = self.total_steps or max(state.max_steps, 1)
        if self.saved not in (None, steps):
            warnings.warn(
                f"gamma_schedule goes over {steps} steps, and went over {self.saved} in the checkpoint: gamma"
                f" jumps. gamma_schedule_steps={self.saved} continues it",
                stacklevel=2,
            )
        assert isinstance(self.focal.gamma, GammaSchedule)
        self.focal.gamma = replace(self.focal.gamma, total_steps=steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.focal.set_step(state.global_step)


def _check_reference(args: FocalPOConfig, model: Any, ref_model: Any, peft_config: Any) -> None:
    """Whether there is a reference where the loss needs one, and none where it does not."""
    if not args.needs_reference:
        for name, given in (
            ("ref_model", ref_model is not None),
            ("precompute_ref_log_probs", args.precompute_ref_log_probs),
            ("sync_ref_model", args.sync_ref_model),
        ):
            if given:
                raise ValueError(
                    f"{name} must not be given: this loss has no reference (reference_free, alpha=0)"
                )
        return
    has_adapter = peft_config is not None or (not isinstance(model, str) and is_peft_model(model))
    if ref_model is not None or isinstance(model, str) or has_adapter or args.precompute_ref_log_probs:
        return
    if not get_config_model_id(model.config):
        raise ValueError(
            f"ref_model must be given, or precompute_ref_log_probs=True: {args.reference_users()} needs a"
            " reference, and the model was not loaded from a path that one could be loaded from"
        )


def _pairs_in(batch: dict[str, Any]) -> int:
    return len(batch["completion_lengths"]) // 2
