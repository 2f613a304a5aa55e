"""Types of arrays, with their shapes; the letters mean the same everywhere, in signatures and in einsums.

B batch, S sequence (queries), T keys, D model width, H query heads, K key/value heads, G = H/K, N head size,
F feed-forward, V vocabulary, E experts, L layers, P prompts.

Tests check shapes at run time (`tests/conftest.py`); in use they cost nothing.
"""

from jax import Array
from jaxtyping import Bool, Float, Float32, Int, Int32, UInt32

__all__ = ["Array", "Bool", "Float", "Float32", "Int", "Int32", "UInt32"]
