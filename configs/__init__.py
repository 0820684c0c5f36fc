"""One file for each model; `get_config(variant)` returns its `ml_collections.ConfigDict`."""
