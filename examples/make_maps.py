"""Images of a pretrained model, and the pixel-wise standard deviation that its output layer leaves open."""

from pathlib import Path

import torch
from matplotlib.figure import Figure

import bayesdiff as bd


def main(folder: str = "maps", images: int = 500, steps: int = 25) -> bd.UncertaintyOutput:
    pipe, data = bd.zoo.load("fashion-ddpm")
    some = data.subset(slice(None, None, max(1, data.num_images // images)))
    posterior = bd.fit(pipe, some, dataset_size=data.dataset_size, training_draws=data.training_draws)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    classes = ["sneaker", "bag", "dress", "coat"]
    out = bd.UncertaintyPipeline(pipe, posterior)(classes, num_inference_steps=steps, generator=generators, output_type="np")
    figure = Figure(figsize=(8, 4), layout="constrained")
    for i, (image, std) in enumerate(zip(out.images, out.std, strict=True)):
        for row, picture in enumerate((image[..., 0], std[0])):
            figure.add_subplot(2, 4, 4 * row + i + 1).imshow(picture, cmap="inferno" if row else "gray")
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / "make_maps.png")
    return out


if __name__ == "__main__":
    print(main())
