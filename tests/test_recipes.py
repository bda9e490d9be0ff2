"""The papers' hyper-parameters: what the papers' text states of each, and the loss that a recipe makes."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest

from focalkern import CosineGamma, FusedFocalPOLoss, recipes

RECIPES = {name: value for name, value in vars(recipes).items() if isinstance(value, recipes.Recipe)}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_makes_its_loss_and_takes_other_options(name):
    recipe = RECIPES[name]
    steps = {"total_steps": 10} if recipe.method == "dynamic" else {}
    loss_fn = recipe.loss(softcap=30.0, **steps)
    assert isinstance(loss_fn, FusedFocalPOLoss)
    assert loss_fn.softcap == 30.0
    for option in ("beta", "margin", "alpha"):
        if option in recipe.options:
            assert getattr(loss_fn, option) == recipe.options[option]
    assert recipe.loss(beta=0.7, **steps).beta == 0.7
    assert recipe.batch_size == 128
    assert recipe.epochs == 1
    assert recipe.source


def test_focalpo_section_4_and_appendix_c():
    mistral, llama = recipes.FOCALPO_MISTRAL_BASE_7B, recipes.FOCALPO_LLAMA3_INSTRUCT_8B
    assert (mistral.learning_rate, llama.learning_rate) == (5e-7, 6e-7)
    assert mistral.loss().beta == 0.01
    for recipe in (mistral, llama):
        loss_fn = recipe.loss()
        assert (loss_fn.gamma, loss_fn.modulation, loss_fn.reference_free) == (0.05, "focalpo", False)


def test_dynamic_focalpo_table_3():
    for recipe, beta, rate in (
        (recipes.DYNAMIC_MISTRAL_BASE_7B, 0.01, 5e-7),
        (recipes.DYNAMIC_LLAMA3_INSTRUCT_8B, 0.1, 6e-7),
    ):
        loss_fn = recipe.loss(total_steps=200)
        assert (loss_fn.beta, loss_fn.gamma, recipe.learning_rate) == (
            beta,
            CosineGamma(200, 0.1, 0.01),
            rate,
        )


def test_margin_and_alpha_stand_outside_beta():
    """The authors' code has β·(Δ − (gamma_beta_ratio + α·M*)), Eq. 12 β·Δ − (γ + α·M*)."""
    loss_fn = recipes.ALPHA_DPO_LLAMA3_INSTRUCT_8B_V02.loss()
    assert (loss_fn.beta, loss_fn.margin, loss_fn.alpha) == (10.0, 4.0, 2.0)
    assert (loss_fn.reference_free, loss_fn.length_normalize, loss_fn.gamma) == (True, True, 0.0)
    simpo = recipes.SIMPO_LLAMA3_INSTRUCT_8B.loss()
    assert simpo.margin == pytest.approx(2.5 * 0.55)
    assert simpo.alpha == 0


@pytest.mark.parametrize(
    ("recipe", "beta", "gamma_beta_ratio", "alpha", "learning_rate"),
    [
        # The authors' README.
        (recipes.SIMPO_MISTRAL_BASE_7B, 2.0, 0.8, 0.0, 3e-7),
        (recipes.SIMPO_MISTRAL_INSTRUCT_7B, 2.5, 0.1, 0.0, 5e-7),
        (recipes.SIMPO_LLAMA3_INSTRUCT_8B, 2.5, 0.55, 0.0, 1e-6),
        # The authors' training configurations: beta, gamma_beta_ratio, alpha, learning_rate.
        (recipes.ALPHA_DPO_MISTRAL_INSTRUCT_7B, 2.5, 0.15, 5e-2, 6e-7),
        (recipes.ALPHA_DPO_LLAMA3_INSTRUCT_8B, 2.5, 0.6, 0.2, 1e-6),
        (recipes.ALPHA_DPO_LLAMA3_INSTRUCT_8B_V02, 10.0, 0.4, 0.2, 1e-6),
        (recipes.ALPHA_DPO_GEMMA2_IT_9B, 10.0, 0.4, 5e-2, 8e-7),
    ],
)
def test_simpo_and_alpha_dpo_are_those_of_their_authors(recipe, beta, gamma_beta_ratio, alpha, learning_rate):
    loss_fn = recipe.loss()
    assert loss_fn.beta == beta
    assert loss_fn.margin == pytest.approx(beta * gamma_beta_ratio)
    assert loss_fn.alpha == pytest.approx(beta * alpha)
    assert recipe.learning_rate == learning_rate


def test_a_recipe_can_be_saved_and_not_changed_by_accident():
    recipe = recipes.DPO_MISTRAL_BASE_7B
    recipe.options["beta"] = 1.0
    assert recipe.loss().beta == 0.01
    assert pickle.loads(pickle.dumps(recipe)) == copy.deepcopy(recipe) == recipe
    assert hash(recipe) == hash(copy.deepcopy(recipe))
    assert json.loads(json.dumps(dataclasses.asdict(recipe)))["model"] == recipe.model
