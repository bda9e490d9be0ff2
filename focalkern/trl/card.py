"""The model card of `FocalPOTrainer`: TRL's, with the method, its paper and the options of the loss."""

from __future__ import annotations

from dataclasses import dataclass

from huggingface_hub import ModelCard
from transformers import TrainerState

import focalkern
from focalkern.trl.config import FocalPOConfig
from focalkern.trl.loss_types import FOCALPO


@dataclass(frozen=True)
class Paper:
    title: str
    authors: str
    year: int
    url: str

    @property
    def citation(self) -> str:
        fields = {"title": f"{{{self.title}}}", "author": self.authors, "year": self.year, "url": self.url}
        lines = ",\n".join(f"    {name} = {{{value}}}" for name, value in fields.items())
        return f"@misc{{{self.authors.split()[1].lower()}{self.year},\n{lines}\n}}"


PAPERS = {
    "DPO": Paper(
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "Rafael Rafailov and Archit Sharma and Eric Mitchell and Stefano Ermon and Christopher D. Manning"
        " and Chelsea Finn",
        2023,
        "https://arxiv.org/abs/2305.18290",
    ),
    "FocalPO": Paper(
        "FocalPO: Enhancing Preference Optimizing by Focusing on Correct Preference Rankings",
        "Tong Liu and Xiao Yu and Wenxuan Zhou and Jindong Gu and Volker Tresp",
        2025,
        "https://aclanthology.org/2025.acl-short.21",
    ),
    "DynamicFocalPO": Paper(
        "DynamicFocalPO: Adaptive Focusing Strategy for Preference Optimization",
        "Shu Zhou and Junan Chen and Rui Ling and Xin Wang and Tao Fan and Hao Wang",
        2026,
        "https://aclanthology.org/2026.findings-acl.1009/",
    ),
    "SimPO": Paper(
        "SimPO: Simple Preference Optimization with a Reference-Free Reward",
        "Yu Meng and Mengzhou Xia and Danqi Chen",
        2024,
        "https://arxiv.org/abs/2405.14734",
    ),
    "α-DPO": Paper(
        "AlphaDPO: Adaptive Reward Margin for Direct Preference Optimization",
        "Junkang Wu and Xue Wang and Zhengyi Yang and Jiancan Wu and Jinyang Gao and Bolin Ding and"
        " Xiang Wang and Xiangnan He",
        2025,
        "https://arxiv.org/abs/2410.10148",
    ),
}
_OF_THE_LOSS = (
    "loss_type",
    "loss_weights",
    "beta",
    "gamma",
    "gamma_schedule",
    "gamma_max",
    "gamma_min",
    "gamma_rate",
    "modulation",
    "margin",
    "gamma_beta_ratio",
    "alpha",
    "reference_free",
    "length_normalize",
    "label_smoothing",
    "ema_momentum",
    "ema_bias_correction",
)
_ALWAYS = ("loss_type", "beta", "gamma")  # the others where they are not at their default
_OF_THE_TRAINING = ("optim", "learning_rate", "lr_scheduler_type", "warmup_steps", "max_length", "seed")
_SENTENCE = "This model is a fine-tuned version of "
_VERSIONS = "### Framework versions\n\n"


def methods_of(config: FocalPOConfig) -> list[str]:
    """The methods of `PAPERS` that the loss is made of; TRL's loss types by their names."""
    found = [name for name in config.loss_type if name != FOCALPO]
    if FOCALPO not in config.loss_type:
        return found
    focal = "DynamicFocalPO" if config.gamma_schedule else "FocalPO" if config.gamma else None
    margin = "α-DPO" if config.alpha else "SimPO" if config.reference_free else None
    return ([name for name in (focal, margin) if name] or ["DPO"]) + found


def complete_card(
    path: str,
    config: FocalPOConfig,
    state: TrainerState,
    base_model: str | None,
    dataset_name: str | None,
    pairs_a_step: int,
) -> None:
    """Write into TRL's card what it lacks, or has wrong: its models are None where they are folders."""
    card = ModelCard.load(path)
    start, versions = (card.text.index(text) for text in (_SENTENCE, _VERSIONS))
    rest = card.text.index("\n", start)
    link = f"`{base_model}`"  # a folder
    if card.data.base_model:
        link = f"[{base_model}](https://huggingface.co/{base_model})"
    papers = [f"[{PAPERS[name].title}]({PAPERS[name].url})" for name in methods_of(config) if name in PAPERS]
    sentence = f"{_SENTENCE}{link}" + f", trained on `{dataset_name}`" * bool(dataset_name)
    sentence += f" with {' and '.join(methods_of(config))}" + f" ({'; '.join(papers)})" * bool(papers) + "."
    card.text = (
        card.text[:start]
        + sentence
        + card.text[rest:versions].replace('model="None"', f'model="{config.output_dir}"')
        + _table(config, state, pairs_a_step)
        + _VERSIONS
        + f"- focalkern: {focalkern.__version__}\n"
        + card.text[versions + len(_VERSIONS) :]
    )
    card.save(path)


def _table(config: FocalPOConfig, state: TrainerState, pairs_a_step: int) -> str:
    values = config.to_dict()  # of plain numbers and names
    fields = FocalPOConfig.__dataclass_fields__
    shown = {
        name: values[name]
        for name in _OF_THE_LOSS
        if values[name] is not None and (name in _ALWAYS or values[name] != fields[name].default)
    }
    shown |= {name: values[name] for name in _OF_THE_TRAINING}
    pairs = "pairs a step"
    if config.max_tokens_per_batch is not None:
        shown["max_tokens_per_batch"], pairs = config.max_tokens_per_batch, f"{pairs}, on average"
    shown |= {pairs: pairs_a_step, "steps": state.global_step, "epochs": round(state.epoch or 0, 3)}
    rows = "".join(f"| {name} | {value} |\n" for name, value in shown.items())
    table = f"| hyper-parameter | value |\n| --- | --- |\n{rows}\n"
    evaluated = [entry for entry in state.log_history if "eval_rewards/accuracies" in entry]
    if evaluated:
        share, step = evaluated[-1]["eval_rewards/accuracies"], evaluated[-1]["step"]
        table += f"After {step} steps, {share:.1%} of the held-out pairs are ranked right.\n\n"
    return table
