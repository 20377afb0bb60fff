"""LSNet (arXiv 2405.16197): underwater image enhancement, trained on pairs of images."""
