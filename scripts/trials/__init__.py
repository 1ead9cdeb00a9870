"""Conversions of many kinds, and small models to convert."""
