"""Tests of moe_train.config."""
