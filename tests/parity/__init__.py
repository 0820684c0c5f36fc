"""The reference data, read and compared: `LDM_JAX_GOLDEN=DIR pytest tests/parity` runs every case of a folder of that
format."""
