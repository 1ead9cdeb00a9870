"""The tests in this folder are transformers' own: only scripts/test_upstream brings them."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("transformers_tests") else ["test_common.py"]
