"""Tests of moe_train.model."""
