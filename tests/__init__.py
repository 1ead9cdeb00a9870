"""Tests, named so that an installed package of the name `tests` is not found in their place."""
