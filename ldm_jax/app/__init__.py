"""The web page: `ldm-app`."""
