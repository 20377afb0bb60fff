"""DP-SGD with noise that differs from element to element; motivated by DP-Hero (arXiv 2409.03344), not its formula."""
