"""SpectralKAN (arXiv 2407.00949): which pixels changed between two hyperspectral images of one place."""
