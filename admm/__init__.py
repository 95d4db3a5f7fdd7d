"""Train PyTorch networks that are cut into blocks, without back-propagating through the cuts."""
