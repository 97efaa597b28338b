"""Small real networks, layers and pipelines that the tests share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    ImagePipelineOutput,
    SD3Transformer2DModel,
    UNet2DModel,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from bayesdiff import LaplacePosterior, fit
from bayesdiff.zoo import ClassConditionalPipeline


def tiny_unet(*, channels: int = 3, classes: int | None = None, seed: int = 0) -> UNet2DModel:
    """A U-Net of a few thousand weights, on ``channels`` × 8 × 8."""
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=channels, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=8, num_class_embeds=classes,
    )  # fmt: skip
    return unet.eval()


def tiny_dit(seed: int = 0) -> DiTTransformer2DModel:
    torch.manual_seed(seed)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    ).eval()  # fmt: skip


def tiny_sd3(seed: int = 0) -> SD3Transformer2DModel:
    torch.manual_seed(seed)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4, pos_embed_max_size=8,
    ).eval()  # fmt: skip


def scheduler(**kwargs) -> DDPMScheduler:
    return DDPMScheduler(**{"num_train_timesteps": 1000, "clip_sample": False, **kwargs})


def class_pipeline(sampler, dtype: torch.dtype = torch.float32, seed: int = 0) -> ClassConditionalPipeline:
    """A tiny class-conditional U-Net with three classes and the null class, in a pipeline that scales its input."""
    unet = tiny_unet(channels=1, classes=4, seed=seed)
    nn.Module.to(unet, dtype)  # diffusers' own .to() warns of an empty list of modules
    pipe = ClassConditionalPipeline(unet, sampler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def class_posterior(pipe: ClassConditionalPipeline, scale: float = 1.0) -> LaplacePosterior:
    """Fitted to 32 random images; ``scale`` divides its covariance."""
    generator = torch.Generator().manual_seed(1)
    data = {
        "images": torch.rand(32, 1, 8, 8, generator=generator) * 2 - 1,
        "class_labels": torch.randint(4, (32,), generator=generator),
    }
    network_only = ClassConditionalPipeline(pipe.unet, scheduler())  # the posterior is not the sampler's
    return fit(
        network_only, data, dataset_size=round(32 * scale), generator=torch.Generator().manual_seed(2), progress=False
    )


class GuidedPipeline(DDIMPipeline):
    """A guided U-Net: what a pipeline can do between network and scheduler.

    Set on the object: ``rescale``, φ of guidance rescale, a number or one for each step; ``interval``, the first and the last
    guided step; ``single``, whether there is one branch where s = 1; ``bend``, what else is done to g; ``mix``, what is added to
    the sample behind each step.
    """

    rescale: float | list[float] = 0.0
    interval = (0, 1000)
    single = True
    bend = staticmethod(lambda g: g)
    mix = 0.0

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=5, scale=3.0, sequential=False, classes=None):
        self.scheduler.set_timesteps(num_inference_steps)
        shape = (batch_size, 1, self.unet.config.sample_size, self.unet.config.sample_size)
        x = randn_tensor(shape, generator=generator, dtype=self.unet.dtype)
        kinds = torch.arange(batch_size) % 3 if classes is None else torch.tensor(classes)
        scales = torch.as_tensor(scale, dtype=self.unet.dtype).view(-1, 1, 1, 1)  # one, or one for each sample
        for n, t in enumerate(self.scheduler.timesteps):
            labels = [torch.full((batch_size,), self.unet.config.num_class_embeds - 1), kinds]
            s = scales if self.interval[0] <= n <= self.interval[1] else torch.ones(1)
            if self.single and bool((s == 1).all()):
                g = self.unet(x, t, class_labels=labels[1]).sample
            else:
                if sequential:
                    f_u, f_c = (self.unet(x, t, class_labels=y).sample for y in labels)
                else:
                    f_u, f_c = self.unet(torch.cat([x, x]), t, class_labels=torch.cat(labels)).sample.chunk(2)
                g = f_u + s * (f_c - f_u)
                amount = self.rescale[n] if isinstance(self.rescale, list) else self.rescale
                if amount:
                    g = g * (1 - amount + amount * f_c.std((1, 2, 3), keepdim=True) / g.std((1, 2, 3), keepdim=True))
            x = self.scheduler.step(self.bend(g), t, x).prev_sample
            x = x + self.mix * x.sin()
        return ImagePipelineOutput(images=(x / 2 + 0.5).clamp(0, 1))


def guided(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[GuidedPipeline, LaplacePosterior]:
    """One on a tiny class-conditional U-Net, and its posterior."""
    pipe = class_pipeline(DDIMScheduler(clip_sample=False), dtype)
    made = GuidedPipeline(pipe.unet, pipe.scheduler)
    made.set_progress_bar_config(disable=True)
    return made, class_posterior(pipe, scale)


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(v) for v in values]


@dataclass(frozen=True)
class LayerCase:
    """A layer, inputs that fit it, and residuals shaped as its output."""

    name: str
    layer: nn.Module
    inputs: Tensor
    residuals: Tensor

    def __str__(self) -> str:
        return self.name


def layer_cases() -> list[LayerCase]:
    """Heads of every kind that is supported, with correlated features as real ones are."""
    generator = torch.Generator().manual_seed(7)

    def make(name: str, layer: nn.Module, *shape: int) -> LayerCase:
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        inputs = torch.randn(shape, generator=generator)
        inputs = torch.nn.functional.silu(inputs + torch.randn(shape[0], *(1,) * (len(shape) - 1), generator=generator))
        with torch.no_grad():
            residuals = torch.randn(layer(inputs).shape, generator=generator)
        return LayerCase(name, layer, inputs, residuals)

    return [
        make("conv3x3", nn.Conv2d(3, 2, 3, padding=1), 16, 3, 5, 4),
        make("conv3x3-one-channel", nn.Conv2d(3, 1, 3, padding=1), 20, 3, 4, 4),
        make("conv1x1", nn.Conv2d(4, 3, 1), 16, 4, 3, 3),
        make("conv5x3-no-bias", nn.Conv2d(2, 2, (5, 3), padding=(2, 1), bias=False), 16, 2, 16, 5),
        make("conv3x3-circular", nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular"), 16, 3, 4, 5),
        make("conv3x3-reflect", nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect"), 16, 3, 4, 5),
        make("conv4x4-same", nn.Conv2d(2, 2, 4, padding="same"), 16, 2, 5, 5),
        make("conv3x3-valid", nn.Conv2d(2, 2, 3, padding="valid"), 16, 2, 5, 5),
        make("conv5x5-lower-than-kernel", nn.Conv2d(2, 1, 5, padding=2), 16, 2, 2, 3),
        make("linear-tokens", nn.Linear(6, 4), 16, 5, 6),
        make("linear-tokens-no-bias", nn.Linear(6, 4, bias=False), 16, 5, 6),
        make("linear-vector", nn.Linear(5, 3), 12, 5),
        make("conv1d3", nn.Conv1d(3, 2, 3, padding=1), 24, 3, 6),
        make("conv1d4-same-no-bias", nn.Conv1d(2, 2, 4, padding="same", bias=False), 16, 2, 7),
        make("conv1d5-circular", nn.Conv1d(2, 3, 5, padding=2, padding_mode="circular"), 16, 2, 5),
        make("conv1d5-lower-than-kernel", nn.Conv1d(2, 1, 5, padding=2), 16, 2, 3),
        make("conv3d3x3x3", nn.Conv3d(2, 2, 3, padding=1), 16, 2, 3, 3, 2),
        make("conv3d1x3x2-no-bias", nn.Conv3d(2, 2, (1, 3, 2), padding=(0, 1, 0), bias=False), 16, 2, 2, 3, 4),
        make("conv3d2x1x3-replicate", nn.Conv3d(2, 2, (2, 1, 3), padding=1, padding_mode="replicate"), 12, 2, 2, 1, 3),
        make("conv3d3x2x2-reflect", nn.Conv3d(1, 2, (3, 2, 2), padding=1, padding_mode="reflect"), 16, 1, 3, 2, 2),
        make("linear-vector-no-bias", nn.Linear(5, 3, bias=False), 12, 5),
        make("linear-frames", nn.Linear(4, 3), 12, 2, 3, 4),
    ]
