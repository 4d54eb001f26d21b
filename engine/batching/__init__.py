"""Continuous batching for engines that we drive: who computes what in a step, and the life of each sequence."""
