"""Train PyTorch networks that are cut into blocks, without back-propagating through the cuts.

Letters in the shapes of tensors, such as [S, N, d_t]:

- S: replicas of the network, one per seed, which are trained together. (R where S is the scores of a factorisation.)
- N: training samples; M: other samples, such as those of a test set.
- n: some of the samples; B: the samples of a mini-batch.
- T: blocks, t = 1..T; L: layers, l = 1..L.
- P: parameters of the network.
- d: features, such as d_t outputs of block t per sample; C: the network's outputs per sample, one per class.
- "..." stands for any number of further axes.
"""
