"""From the posterior of the weights to a variance at the end of a sampler."""
