"""EnLa-style prompt learning (arXiv 2407.19674): few images adapt a frozen CLIP, with optimal transport."""
