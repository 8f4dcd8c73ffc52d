"""MedMamba (arXiv 2403.03849): a hybrid convolution and state-space image classifier."""
