"""Frozen pretrained networks (LPIPS, Inception, EfficientNet, ConvNeXt, DINO), and readers of weight files.

Untrusted inputs: weight files (.pth, .pt, .ckpt, .safetensors, .npz), .npz files of samples or statistics, images, and
tar shards come from elsewhere. Reading them must never run their code, and must fail with a one-line UsageError instead
of exhausting memory, stack or disk. That is what the limits are for in archive_limits, state_dict_pickle,
tensor_files, data/tar_reader and data/preprocess; tests/data/test_hostile_files.py and tests/pretrained hold them.
"""
