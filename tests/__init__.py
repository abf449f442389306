"""Tests of moe_train, in folders that mirror its packages."""
