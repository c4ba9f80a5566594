"""Kernels. Importing them imports Triton; nothing is compiled before the first launch."""
