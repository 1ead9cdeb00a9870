"""Turn the outliers of a pretrained language model into explicit parameters."""

__version__ = "0.1.0"
