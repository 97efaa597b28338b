"""Fitting: clean data through a pretrained network, features and residuals of its head into sums."""

from bayesdiff.fitting.one_step import Features as Features
from bayesdiff.fitting.one_step import features as features
from bayesdiff.fitting.regression import fit as fit
