"""Is Monte Carlo needed? Errors and times on the head, the features and the links of a model. The shipped one; put in yours.

python examples/compare_mc_analytic.py [folder for the table and figure] [images]
"""

import sys

import torch

import bayesdiff as bd

folder = sys.argv[1] if len(sys.argv) > 1 else "comparison"
number = int(sys.argv[2]) if len(sys.argv) > 2 else 200

pipe, data = bd.zoo.load("fashion-ddpm")  # or your pipeline, and images of yours
seed = torch.Generator().manual_seed(0)
known = {"dataset_size": data.dataset_size, "training_draws": data.training_draws}
posterior = bd.fit(pipe, data.subset(slice(number)), generator=seed, **known)

# What enters the head for eight held-out images, from little noise to much.
features = bd.features(pipe, data.heldout.subset(slice(8)), timesteps=range(60, 1000, 120), generator=seed)
links = ["identity", "clamped_pixel", "sigmoid", bd.links.Exceedance(0.5), bd.links.Smooth(torch.exp)]
comparison = bd.compare(posterior, features, links, generator=seed)
comparison.save(folder)
print(comparison)
