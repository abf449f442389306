"""Tests of moe_train.data."""
