"""Tests of moe_train.ops."""
