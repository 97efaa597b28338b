"""A diffusers pipeline for class-conditional networks in pixel space.

diffusers has the network (``UNet2DModel`` with class embeddings) but no pipeline that runs it with
classifier-free guidance. This one is plain: every model call is ``unet(...)``, every update is
``scheduler.step(...)``, and nothing else happens to the sample in between.
"""

# No `from __future__ import annotations`: diffusers reads the component types off __init__ at run time.

import difflib
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Generator, Tensor

from bayesdiff.checks import ArgumentError, ShapeError, UnknownNameError, check_choice, check_int

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class ClassConditionalPipeline(DiffusionPipeline):
    r"""Samples of a class-conditional pixel-space network, with classifier-free guidance.

    .. math:: g(x_t, t, c) = f(x_t, t, \varnothing) + s\,[f(x_t, t, c) - f(x_t, t, \varnothing)]

    (Ho & Salimans 2022, with :math:`s = 1 + w`). The null class :math:`\varnothing` is the network's last
    class embedding.

    Args:
        unet: The network, with ``num_class_embeds`` = number of classes + 1.
        scheduler: Any scheduler of diffusers that fits what the network predicts.
        id2label: The names of each class, by index; several names of one class are separated by commas,
            the first of them is the one shown.

    Raises:
        ArgumentError: The network has no class embeddings, or ``id2label`` doesn't fit them.
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: KarrasDiffusionSchedulers,
        id2label: dict[str, str] | dict[int, str] | None = None,
    ) -> None:
        super().__init__()
        embeddings = unet.config.num_class_embeds
        if embeddings is None or embeddings < 2:
            raise ArgumentError(
                "expected a network with class embeddings, of which the last is the null class, got "
                f"num_class_embeds = {embeddings}"
            )
        self.num_classes: int = embeddings - 1
        labels = {int(key): value for key, value in (id2label or {}).items()}  # JSON made the keys strings
        if labels and set(labels) != set(range(self.num_classes)):
            raise ArgumentError(
                f"expected id2label to name the classes 0 to {self.num_classes - 1}, got {sorted(labels)}"
            )
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(id2label={str(key): labels[key] for key in sorted(labels)} or None)
        synonyms = [[name.strip() for name in labels[key].split(",")] for key in sorted(labels)]
        self.class_names: tuple[str, ...] = tuple(names[0] for names in synonyms)
        self._index = {_key(name): index for index, names in enumerate(synonyms) for name in names}

    def class_indices(self, classes: str | int | Sequence[str | int]) -> list[int]:
        """The class embedding of each of ``classes``; see :meth:`__call__`.

        Raises:
            UnknownNameError: A name or an index is not one of the network's classes.
            ArgumentError: The list is empty.
        """
        several = [classes] if isinstance(classes, (str, int, np.integer)) else list(classes)
        if not several:
            raise ArgumentError("expected at least one class, got none")
        return [self._class_index(c) for c in several]

    def _class_index(self, wanted: str | int) -> int:
        if isinstance(wanted, str):
            index = self._index.get(_key(wanted))
            if index is not None:
                return index
            close = difflib.get_close_matches(_key(wanted), self._index, n=3)
            near = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            known = ", ".join(map(repr, self.class_names)) or f"the integers 0 to {self.num_classes - 1}"
            raise UnknownNameError(f"expected a class that the network knows ({known}), got {wanted!r}{near}")
        if isinstance(wanted, bool) or not 0 <= wanted < self.num_classes:
            names = f" ({', '.join(map(repr, self.class_names))})" if self.class_names else ""
            raise UnknownNameError(f"expected a class from 0 to {self.num_classes - 1}{names}, got {wanted!r}")
        return int(wanted)

    @torch.no_grad()
    def __call__(
        self,
        classes: str | int | Sequence[str | int],
        *,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> Any:
        """Draw one sample for each of ``classes``.

        Args:
            classes: One class or a list of B: names ("sneaker", "a sneaker"; case is ignored) or indices.
            guidance_scale: s; at 1 the null class is not evaluated.
            num_inference_steps: Denoising steps, at least 1.
            eta: η of DDIM, for schedulers whose step takes it.
            generator: One for the batch, or a list of B. With a list a sample does not depend on its batch.
            latents: Standard normal noise ``(B, C, H, W)`` to start from; drawn from ``generator`` by default.
            output_type: "pil" (mode L for one channel), "np" ``(B, H, W, C)``, "pt" ``(B, C, H, W)``, all
                of pixels in [0, 1], or "latent": the sampler's last sample as it is.
            return_dict: False returns ``(images,)``.
            callback_on_step_end: As of other diffusers pipelines: given the pipe, the step's number, t and ``{"latents": …}``, it
                returns the latents to go on with in the same form.

        Returns:
            ``ImagePipelineOutput`` with ``.images``.

        Raises:
            UnknownNameError: A class is unknown.
            ArgumentError: Fewer than one step, an unknown output type, a wrong number of generators.
            ShapeError: ``latents`` don't fit.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        num_inference_steps = check_int("num_inference_steps", num_inference_steps, least=1)
        indices = self.class_indices(classes)
        batch = len(indices)
        if isinstance(generator, (list, tuple)) and len(generator) != batch:
            raise ArgumentError(f"expected one generator for each of the {batch} samples, got {len(generator)}")
        device, dtype = self._execution_device, self.unet.dtype
        guided = guidance_scale != 1
        labels = torch.tensor(indices, device=device)
        if guided:
            labels = torch.cat([torch.full_like(labels, self.num_classes), labels])

        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch, self.unet.config.in_channels, height, width)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ShapeError(f"expected latents {shape}, got {tuple(latents.shape)}")

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        extra = self._extra_step_kwargs(generator, eta)
        sample = latents.to(device, dtype) * self.scheduler.init_noise_sigma
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            x = torch.cat([sample, sample]) if guided else sample
            x = self.scheduler.scale_model_input(x, t)
            f = self.unet(x, t, class_labels=labels, return_dict=False)[0]
            if guided:
                f_u, f_c = f.chunk(2)
                f = f_u + guidance_scale * (f_c - f_u)
            sample = self.scheduler.step(f, t, sample, **extra, return_dict=False)[0]
            if callback_on_step_end is not None:
                sample = callback_on_step_end(self, i, t, {"latents": sample}).get("latents", sample)

        images = self._images(sample, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _extra_step_kwargs(self, generator: Generator | list[Generator] | None, eta: float) -> dict[str, Any]:
        """What this scheduler's step takes beyond (model output, t, sample): the signatures differ."""
        accepted = inspect.signature(self.scheduler.step).parameters
        offered = {"eta": eta, "generator": generator}
        return {name: value for name, value in offered.items() if name in accepted}

    def _images(self, sample: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return sample
        pixels = (sample / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return pixels
        array = pixels.float().cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "np":
            return array
        grey = array.shape[-1] == 1
        return [Image.fromarray(image[..., 0] if grey else image) for image in (array * 255).round().astype(np.uint8)]


def _key(name: str) -> str:
    """What names are compared by: case, outer blanks and a leading article don't count."""
    return re.sub(r"^(a|an|the)\s+", "", " ".join(name.lower().split()))
