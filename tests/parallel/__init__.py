"""Tests of moe_train.parallel."""
