"""Learning captions by their score: the reward is CIDEr-D, and what scores well gets likelier."""

from dataclasses import replace

import pytest
import torch

from minigpt4.data.examples import read_descriptions, read_shards, with_instructions
from minigpt4.errors import UserError
from minigpt4.evaluation.metrics import caption_scores
from minigpt4.training.extended import ExtendedRecipe, ExtendedTrainer
from minigpt4.training.selfcritical import CiderReward, advantages, sample
from tests.training_case import SCHEDULE, tiny_model, write_descriptions, write_shard

REFERENCES = {
    "a": ["A dog runs on the grass", "A brown dog is running", "The dog plays outside on grass"],
    "b": ["Two children sit on a red sofa", "Kids on a couch", "Two kids watch the television"],
    "c": ["A man climbs a steep rock", "A climber on the rock face", "A man is rock climbing"],
}
ANSWERS = {
    "a": "A dog is running on grass",
    "b": "Two kids sit on the grass",
    "c": "A dog climbs rock rock rock",
}


def test_the_reward_is_cider():
    """The same as the reference implementation's, where the end is spelled out as a word."""
    reward = CiderReward(REFERENCES)
    ours = [reward(key, text) for key, text in ANSWERS.items()]
    spelled = {k: [f"{t} zzz" for t in texts] for k, texts in REFERENCES.items()}
    expected = caption_scores({k: f"{t} zzz" for k, t in ANSWERS.items()}, spelled)["cider"]
    assert sum(ours) / len(ours) == pytest.approx(expected, abs=1e-6)
    assert reward("a", "A dog runs on the grass") > reward("a", "A dog runs on the grass", False)
    assert reward("a", "") == pytest.approx(0, abs=0.2)


def test_agreement_is_each_references_score_against_the_others():
    agreement = CiderReward(REFERENCES).agreement("a")
    odd = CiderReward(REFERENCES | {"a": [*REFERENCES["a"][:2], "Rain over Paris"]}).agreement("a")
    assert len(agreement) == 3 and min(agreement) > 0
    assert odd[2] == min(odd) and odd[2] < min(agreement)


def test_advantages_compare_with_the_others():
    assert advantages([1.0, 2.0, 3.0]) == pytest.approx([-1.5, 0.0, 1.5])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_are_the_models(temperature):
    """Drawn ids are as likely as the model says: the commonest first id is drawn most often."""
    model = tiny_model("llama2_patch_concat")
    torch.manual_seed(0)
    inputs = torch.randn(1, 5, model.config.llm_hidden_size) * 0.2
    generator = torch.Generator().manual_seed(1)
    drawn = sample(model, inputs, 2000, 1, temperature, generator)[0]
    with torch.inference_mode():
        logits = model.llm(inputs_embeds=inputs).logits[0, -1].float()
    likely = (logits / temperature).softmax(-1)
    counts = torch.bincount(torch.tensor([ids[0] for ids in drawn]), minlength=len(likely)) / 2000
    assert (counts - likely).abs().max() < 0.05


def test_greedy_answers_do_not_depend_on_chance():
    """The first of the likeliest: logits in 16 bit often tie."""
    model = tiny_model("llama2_patch_concat")
    model.torch_llm.get_output_embeddings().weight.data.zero_()
    assert sample(model, torch.zeros(1, 2, model.config.llm_hidden_size), 2, 3, 0.0) == [
        [[0] * 3] * 2
    ]


def trainer(tmp_path, **options) -> ExtendedTrainer:
    shard = write_shard(tmp_path / "train-00000.tar")
    described = read_descriptions(write_descriptions(tmp_path / "described"))
    recipe = ExtendedRecipe(SCHEDULE, ("Describe.",), replay_share=0.5, samples=3)
    replay = with_instructions(read_shards(str(shard)), ("Say it briefly.",))
    model = tiny_model(options.pop("case", "llama2_patch_concat"))
    return ExtendedTrainer(
        model, described, replace(recipe, **options), tmp_path / "run", replay=replay
    )


def test_a_run_is_reproducible_and_changes_the_projection(tmp_path):
    runs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run = trainer(tmp_path / name)
        run.run()
        runs.append(run)
    assert [r["loss"] for r in runs[0].rows] == [r["loss"] for r in runs[1].rows]
    assert len(runs[0].rewards) == SCHEDULE.steps * 2
    torch.testing.assert_close(runs[0].model.projection.weight, runs[1].model.projection.weight)


def test_templates_without_an_end_token_are_refused(tmp_path):
    with pytest.raises(UserError, match="--samples"):
        trainer(tmp_path, case="vicuna_qformer_a")
