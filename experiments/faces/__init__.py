"""Faces: readers of LFW and LFWA, pretrained backbones, and the linear probes of the paper's Tables 1 and 2."""
