"""Tests of moe_train.model.moe.routers."""
