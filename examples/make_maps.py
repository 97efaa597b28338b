"""Images, and the pixel-wise std that the weights of the output layer leave open. For the shipped model; put in yours.

python examples/make_maps.py [folder for the figure] [images that the posterior is fitted to]
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

import bayesdiff as bd

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "maps")
number = int(sys.argv[2]) if len(sys.argv) > 2 else 500

pipe, data = bd.zoo.load("fashion-ddpm")  # or your pipeline, and images of yours
known = {"dataset_size": data.dataset_size, "training_draws": data.training_draws}
posterior = bd.fit(pipe, data.subset(slice(number)), generator=torch.Generator().manual_seed(0), **known)
seeds = [torch.Generator().manual_seed(i) for i in range(4)]
classes = ["sneaker", "bag", "dress", "coat"]
out = bd.UncertaintyPipeline(pipe, posterior)(classes, num_inference_steps=25, generator=seeds, output_type="np")

figure = Figure(figsize=(8, 4), layout="constrained")
for i, (image, std) in enumerate(zip(out.images, out.std, strict=True)):
    figure.add_subplot(2, 4, i + 1).imshow(image[..., 0], cmap="gray")
    figure.add_subplot(2, 4, i + 5).imshow(std[0], cmap="inferno")
folder.mkdir(parents=True, exist_ok=True)
figure.savefig(folder / "make_maps.png")
print(out)
