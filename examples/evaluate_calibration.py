"""Are a model's predictions of images that it never saw calibrated, and by which variance? For the shipped model; put in yours.

python examples/evaluate_calibration.py [folder for the table and figure] [held-out images]
"""

import sys

import torch

import bayesdiff as bd

folder = sys.argv[1] if len(sys.argv) > 1 else "calibration"
number = int(sys.argv[2]) if len(sys.argv) > 2 else 200

pipe, data = bd.zoo.load("fashion-ddpm")  # or your pipeline, and images of yours
seed = torch.Generator().manual_seed(0)
known = {"dataset_size": data.dataset_size, "training_draws": data.training_draws}
posterior = bd.fit(pipe, data.subset(slice(number)), generator=seed, **known)

# Half of the held-out images fit the noise models, the other half judges them.
heldout = data.heldout.subset(slice(0, None, max(1, data.heldout.num_images // number)))
report = bd.evaluate(posterior, pipe, heldout, generator=seed, settings=bd.Evaluation(bins=5, probes=2))
report.save(folder)
print(report)

# What was fitted: one noise model for each bin of t, here the one that is recommended.
print(report.noise[0]["log-linear, quantiles"].shape)
