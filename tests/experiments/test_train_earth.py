"""The training of the earth models: the split, the captions, and the stand-in for many equal tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import nn

from experiments.train_earth import data
from experiments.train_earth.denoisers import EarthSD3, tokenize
from experiments.train_earth.models import build_tokenizer, build_transformer, build_vae, save_tokenizer
from experiments.train_earth.start import principal_components, start_linear
from experiments.train_earth.train import Run, Settings, averaged

pytest.importorskip("transformers")


def small_world(land: np.ndarray, cover: int = 2, rough: float = 0.0) -> data.World:
    return data.World(
        np.zeros((64, 64, 3), np.uint8), land, np.full((64, 64), cover, np.uint8), np.full((64, 64), rough, np.float32)
    )


def test_contents_are_measured():
    land = np.zeros((64, 64), bool)
    assert data.contents(small_world(land), 0, 0) == ("sea", "open sea")
    land[20:40, 20:40] = True
    assert data.contents(small_world(land), 0, 0) == ("island", "an island in the sea")
    land[50:58, 50:58] = True
    assert data.contents(small_world(land), 0, 0) == ("island", "islands in the sea, forest")
    land[:, :30] = True
    assert data.contents(small_world(land, 1, 20.0), 0, 0) == ("coast", "sea and coast, desert with mountains")
    assert data.contents(small_world(np.ones_like(land), 3), 0, 0) == ("grassland", "grassland")


def test_patches_lie_on_one_side_of_the_split():
    west = int((data.HELDOUT_BANDS[0][0] + 180) * 15)
    east = int((data.HELDOUT_BANDS[0][1] + 180) * 15)
    assert data.in_heldout_band(west) is True
    assert data.in_heldout_band(east - 64) is True
    assert data.in_heldout_band(west - 64) is False
    assert data.in_heldout_band(east) is False
    assert all(data.in_heldout_band(x) is None for x in (west - 63, west - 1, east - 63, east - 1))


def test_latitudes_have_names():
    assert data.latitude_band(-10)[0] == "tropical"
    assert data.latitude_band(45)[1] == "in the temperate north"
    assert data.latitude_band(-70)[1] == "in the polar south"


def test_the_tokenizer_knows_every_letter_and_is_saved(tmp_path):
    tokenizer = build_tokenizer(["open sea in the tropics", "a desert"] * 3)
    save_tokenizer(tokenizer, tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path, local_files_only=True)
    prompts = ["", "a desert", "quick brown fox, jumped! é"]
    ids = tokenize(tokenizer, prompts)
    assert ids.shape == (3, 24)
    assert tokenize(again, prompts).equal(ids)
    end = tokenizer.eos_token_id
    assert (ids[0, 1:] == end).all()
    assert (ids[2] == end).sum() == (ids[2].flip(0) == end).long().cumprod(0).sum()  # at the end only: all are known
    assert {"vocab.json", "merges.txt", "tokenizer.json"} <= {file.name for file in tmp_path.iterdir()}


@pytest.mark.parametrize("repeats", [1, 7, 256])
def test_one_token_stands_for_many(repeats):
    """The output is that of diffusers' own attention on all copies, in float64."""
    torch.manual_seed(0)
    transformer = build_transformer().double().eval()
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.1)  # some start at zero, which would hide everything
    processor = EarthSD3(["a desert"]).processor
    x = torch.randn(2, 4, 16, 16, dtype=torch.float64)
    text, pooled = torch.randn(2, 24, 256, dtype=torch.float64), torch.randn(2, 256, dtype=torch.float64)
    times = torch.tensor([300.0, 500.0], dtype=torch.float64)

    def run(zeros: int) -> torch.Tensor:
        context = torch.cat([text, text.new_zeros(2, zeros, 256)], 1)
        with torch.no_grad():
            return transformer(x, context, pooled, times).sample

    transformer.set_attn_processor(JointAttnProcessor2_0())
    full = run(repeats)
    transformer.set_attn_processor(processor)
    processor.repeats = repeats
    assert (run(1) - full).abs().max() < 1e-12 * full.abs().max()


def test_a_run_that_was_cut_goes_on_with_the_same_bits(tmp_path):
    def run(folder, until=None):
        torch.manual_seed(0)
        network = nn.Linear(3, 2)

        def loss_of(step, generator):
            if step == until:
                raise KeyboardInterrupt
            return network(torch.randn(4, 3, generator=generator)).square().mean()

        Run(network, Settings(6, warmup=2), folder).train(loss_of, save_every_s=0.0)
        return averaged(folder)

    whole, state = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", until=4)
    resumed, _ = run(tmp_path / "cut")
    assert state["step"] == 6
    assert all(resumed[name].equal(value) for name, value in whole.items())
    with pytest.raises(ValueError, match=r"expected .*'steps': 7"):
        Run(nn.Linear(3, 2), Settings(7, warmup=2), tmp_path / "cut")


def test_the_vae_starts_almost_linear():
    """Its latents are the principal components of 4 × 4 blocks; a picture of large areas comes back."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(32, 3, 6, 6, generator=generator) * 1.6 - 0.8
    images = nn.functional.interpolate(coarse, (64, 64), mode="bicubic").clamp(-1, 1)
    vae = build_vae().eval()
    start_linear(vae, images)
    mean, directions, deviations = principal_components(images)
    blocks = nn.functional.unfold(images, 4, stride=4).transpose(1, 2)
    components = ((blocks - mean) @ directions / deviations).transpose(1, 2).reshape(32, 4, 16, 16)
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean
        back = vae.decode(latents).sample
    for found, exact in zip(latents.unbind(1), components.unbind(1), strict=True):
        assert torch.corrcoef(torch.stack([found.flatten(), exact.flatten()]))[0, 1] > 0.98
    assert (back - images).square().mean() < 0.1 * images.square().mean()
