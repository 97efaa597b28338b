"""The output layer of a denoising network: where it is, and how it computes."""
