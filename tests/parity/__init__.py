"""Comparison with recorded reference data; `LDM_JAX_GOLDEN=DIR` selects another folder."""
