"""How good a model is: denoising error on held-out images, distances between sets of images, the digits' judge."""
